"""The code of README.md and CONTRIBUTING.md runs as it stands, block after block, in one namespace each."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_code(page, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # what it writes, it writes here
    text = (ROOT / page).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks, f"{page} has no ```python block"
    namespace: dict = {"__name__": "page"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        code = compile("\n" * line + block[1], page, "exec")  # errors point into the page
        exec(code, namespace)
    assert "eomdl" in namespace

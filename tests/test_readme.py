"""The README's code runs as it stands, block after block, in one namespace."""

import re
from pathlib import Path

import pytest


README = Path(__file__).parent.parent / "README.md"


def test_readme(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # what it writes, it writes here
    text = README.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks, "README.md has no ```python block"
    namespace: dict = {"__name__": "readme"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        code = compile("\n" * line + block[1], str(README), "exec")  # errors point into the README
        exec(code, namespace)
    assert "eomdl" in namespace

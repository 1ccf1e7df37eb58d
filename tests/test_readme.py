"""The code of README.md and CONTRIBUTING.md runs as it stands and prints what they show."""

import re
from pathlib import Path

import numpy as np
import pytest


ROOT = Path(__file__).parent.parent


# Code, and what it prints where that is shown.
BLOCK = r"^```python\n(.*?)^```\n(?:\n```text\n(?P<shown>.*?)^```\n)?"
NUMBER = r"\d\.\d+e[+-]\d+"


def assert_same_print(printed: str, shown: str) -> None:
    """The same words, and numbers to 5 % (another processor rounds otherwise)."""
    words = [re.sub(rf"{NUMBER}|\s+", " ", text).split() for text in (printed, shown)]
    assert words[0] == words[1]
    numbers = [[float(x) for x in re.findall(NUMBER, text)] for text in (printed, shown)]
    np.testing.assert_allclose(*numbers, rtol=0.05)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_code(page, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)  # what it writes, it writes here
    text = (ROOT / page).read_text()
    blocks = list(re.finditer(BLOCK, text, re.DOTALL | re.MULTILINE))
    assert blocks, f"{page} has no ```python block"
    namespace: dict = {"__name__": "page"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        code = compile("\n" * line + block[1], page, "exec")  # errors point into the page
        capsys.readouterr()
        exec(code, namespace)
        if block["shown"]:
            assert_same_print(capsys.readouterr().out, block["shown"])
    assert "eomdl" in namespace

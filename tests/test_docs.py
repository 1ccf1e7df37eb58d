"""The documentation as it is written; that it builds, `mkdocs build --strict` says."""

import inspect
import re
from pathlib import Path

import pytest

import eomdl


pytestmark = pytest.mark.source
DOCS = Path(__file__).parent.parent / "docs"
PAGES = {str(page.relative_to(DOCS)): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
NAMESPACES = [name for name in eomdl.__all__ if inspect.ismodule(getattr(eomdl, name))]
NAV = (DOCS.parent / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
FENCE = re.compile(r"^ *```(\w*)(.*)$", re.MULTILINE)


def test_there_are_pages():
    assert len(PAGES) > 20


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_code_is_run(page):
    fences = FENCE.findall(PAGES[page])
    opening = fences[::2]
    assert all(language == "" for language, _ in fences[1::2])
    for language, options in opening:
        assert language in ("python", "bash"), f"{language} block"
        if language == "python":
            assert 'exec="1"' in options, f"a block of {page} is not run"


@pytest.mark.parametrize("page", PAGES)
def test_a_reader_can_copy_the_blocks_in_their_order(page):
    """What is run and not shown draws or lists something, and defines nothing for the blocks after it."""
    blocks = re.findall(r"^```python (.*?)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    for options, code in blocks:
        if "source=" in options:
            assert "_figures" not in code
            assert "_names" not in code
            assert "sep=" not in code
            assert max(map(len, code.splitlines())) <= 88
        else:
            rest = re.sub(r"^(from [\w.]+ import .*|)\n", "", code, flags=re.MULTILINE)
            assert rest.startswith("print("), f"a hidden block of {page} does more than print:\n{code}"


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_in_the_navigation_and_has_a_title(page):
    assert f": {page}\n" in NAV
    assert PAGES[page].startswith("# ")


@pytest.mark.parametrize("space", NAMESPACES)
def test_every_namespace_has_a_page_with_all_its_names(space):
    page = PAGES[f"reference/{space}.md"]
    # Without options of its own, so that the page has all of `__all__`; the build's hook looks for each name.
    assert page.endswith(f"\n::: eomdl.{space}\n")
    module = getattr(eomdl, space)
    assert all(inspect.getdoc(getattr(module, name)) for name in module.__all__)


def test_every_name_of_the_top_level_is_described():
    page = PAGES["reference/eomdl.md"]
    assert "print(top_level())" in page
    assert page.endswith("\n::: eomdl\n")
    assert all(inspect.getdoc(getattr(eomdl, name)) for name in eomdl.__all__ if name != "__version__")

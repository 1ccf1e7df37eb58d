"""What the build does beyond its plugins: formulas as MathML, and a check that the reference is whole.

MathML is drawn by the browser itself, so that no page loads a script or a font for it.
"""

import html
import importlib
import re
import sys
from pathlib import Path

import latex2mathml.converter
from _figures import use_docs_style
from _names import NAMESPACES
from mkdocs.exceptions import PluginError


# Arithmatex leaves \(...\) for $...$ and \[...\] for $$...$$.
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)
_anchors: set[str] = set()


def on_config(config):
    sys.path.insert(0, str(Path(__file__).parent))  # the pages' blocks import from here
    use_docs_style()


def _mathml(match: re.Match) -> str:
    tag, bracket, latex = match.groups()
    latex = (
        html.unescape(latex).strip().replace(r"\arg", r"\operatorname{arg}")
    )  # not known to latex2mathml
    display = "block" if bracket == "[" else "inline"
    made = latex2mathml.converter.convert(latex, display=display)
    left = re.search(r"\\[A-Za-z]+", re.sub(r"<annotation.*?</annotation>", "", made))
    if left:
        raise PluginError(
            f"formula: expected LaTeX that latex2mathml knows, got {left[0]} in {latex}"
        )
    # A bar is a delimiter here, and never a relation with space around it.
    made = re.sub(
        r"<mo[^>]*>(&#x0?0?0?7C;|\|)</mo>",
        '<mo stretchy="false" lspace="0" rspace="0">|</mo>',
        made,
    )
    # A long formula in a sentence gets a box that scrolls, where the page is narrow.
    kind = "math long" if tag == "span" and len(latex) > 50 else "math"
    return f'<{tag} class="{kind}">{made}</{tag}>'


def on_page_content(content: str, page, **kwargs) -> str:
    _anchors.update(re.findall(r'id="(eomdl\.[\w.]+)"', content))
    return _FORMULA.sub(_mathml, content)


# What a browser would load by itself; a link that a reader may follow is none of it.
_REMOTE = re.compile(
    r"""(?:\bsrc=|<link\b(?![^>]*\brel="?(?:canonical|prev|next)\b)[^>]*\bhref=|@import |url\()["']?(?:https?:)?//"""
)


def on_post_build(config, **kwargs) -> None:
    public = {
        f"{space}.{name}"
        for space in ("eomdl", *(f"eomdl.{space}" for space in NAMESPACES))
        for name in importlib.import_module(space).__all__
        if name not in (*NAMESPACES, "__version__")
    }
    missing = sorted(public - _anchors)
    if missing:
        raise PluginError(
            f"reference: expected every public name, these are missing: {missing}"
        )
    for path in Path(config["site_dir"]).rglob("*"):
        if path.suffix in (".html", ".css") and _REMOTE.search(path.read_text()):
            raise PluginError(
                f"{path}: expected a page that loads nothing from elsewhere"
            )

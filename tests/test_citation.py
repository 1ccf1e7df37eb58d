"""What to cite for a flow: complete BibTeX, and the same data as in CITATION.cff."""

import re
from pathlib import Path
from typing import ClassVar

import pytest
from registry import EQUATIONS, FLOWS, Flow, make_flow

import eomdl
from eomdl.flows.references import ENTRIES


ROOT = Path(__file__).parent.parent
REQUIRED = {
    "article": {"author", "title", "journal", "year"},
    "book": {"author", "title", "publisher", "year"},
    "inproceedings": {"author", "title", "booktitle", "year"},
    "misc": {"author", "title"},
}
FIELD = re.compile(r"^  (\w+)\s*= \{(.*)\},$")


def parsed(text: str) -> dict[str, tuple[str, dict[str, str]]]:
    """{key: (kind, fields)} of BibTeX with a field a line; `AssertionError` for anything else."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for entry in text.split("\n\n"):
        first, *lines, last = entry.splitlines()
        kind, key = re.fullmatch(r"@(\w+)\{(\w+),", first).groups()
        assert last == "}"
        assert key not in found
        fields = [FIELD.fullmatch(line).groups() for line in lines]
        assert len({name for name, _ in fields}) == len(fields)
        for _, value in fields:
            depth = 0
            for letter in value:
                depth += {"{": 1, "}": -1}.get(letter, 0)
                assert depth >= 0
            assert depth == 0
            assert value.strip("{} ")
        found[key] = kind, dict(fields)
    return found


def test_every_entry_is_complete():
    for key, entry in ENTRIES.items():
        ((found, (kind, fields)),) = parsed(entry).items()
        assert found == key
        assert REQUIRED[kind] <= set(fields)
        assert re.fullmatch(r"(19|20)\d\d", fields["year"])
        assert fields["year"] in key
        first_author = fields["author"].partition(",")[0].lower()
        assert key.startswith(first_author)
        assert re.fullmatch(r"\d{4}\.\d{4,5}", fields.get("eprint", "0000.00000"))  # four digits up to 2014


@pytest.mark.parametrize("entry", [*FLOWS, EQUATIONS[0]], ids=lambda entry: entry.name)
def test_every_flow_has_its_papers(entry: Flow):
    flow = make_flow(entry)
    cited = parsed(eomdl.citation(flow))
    assert flow.references
    assert list(cited) == ["eomdl", *flow.references]
    # The docstring names the same papers by author and year.
    said = " ".join(type(flow).__doc__.split())
    for key in flow.references:
        author, year = re.fullmatch(r"([a-z]+)(\d{4})[a-z]*", key).groups()
        assert re.search(rf"\b{author}\b.{{,40}}\b{year}\b", said, re.IGNORECASE), key


def test_the_package_s_entry_says_what_CITATION_cff_says():
    cff = (ROOT / "CITATION.cff").read_text()
    kind, own = parsed(eomdl.citation(make_flow(FLOWS[0])))["eomdl"]
    plain = {name: re.sub("[{}]", "", value) for name, value in own.items()}
    assert kind == "misc"
    assert f'title: "{plain["title"]}"' in cff
    assert f'name: "{plain["author"]}"' in cff
    assert f"\nversion: {eomdl.__version__}\n" in cff
    assert plain["note"].endswith(eomdl.__version__)
    paper = parsed(ENTRIES["miyagawa2022"])["miyagawa2022"][1]
    assert paper["title"] in cff
    assert paper["eprint"] in cff


class Still(eomdl.AbstractFlow):
    """A user's own flow."""

    step_size: float = 1.0

    def __call__(self, t, state, args):
        return 0.0 * state


def test_a_flow_of_the_user_s_cites_the_package_and_what_it_names_itself():
    assert list(parsed(eomdl.citation(Still()))) == ["eomdl"]

    class Sourced(Still):
        references: ClassVar[tuple[str, ...]] = (
            "smith2021",
            ENTRIES["ghosh2023"].replace("ghosh2023", "own1999"),
        )

    assert list(parsed(eomdl.citation(Sourced()))) == ["eomdl", "smith2021", "own1999"]

    class Unknown(Still):
        references: ClassVar[tuple[str, ...]] = ("smith1999",)

    with pytest.raises(ValueError, match=r"flow\.references: expected keys of .*, got 'smith1999'"):
        eomdl.citation(Unknown())


def test_only_flows_are_cited():
    with pytest.raises(ValueError, match=r"flow: expected an eomdl\.AbstractFlow, got str"):
        eomdl.citation("gradient flow")

"""What every result has: a table, a frame, a picture, notes, a file, and a view in a notebook.

A new type of result is tested by being listed in `MAKE`.
"""

import base64
import builtins
import dataclasses
import html
import html.parser
import io
import itertools
import os
import pickle
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import VALLEY, assert_identical, valley_loss
from matplotlib.figure import Figure

import eomdl
from eomdl import choice, curvature, errors, geometry, symmetry, telemetry
from eomdl._result import AbstractResult, Note, Table, format_cell, format_number, plot, series_table
from eomdl.choice.candidates import Candidate
from eomdl.curvature.parts import OverBatches
from eomdl.errors.convergence import Convergence
from eomdl.geometry.regions import RegionsOnLine
from eomdl.plotting._lines import as_label
from eomdl.storage.files import write_npz
from eomdl.storage.values import encode
from eomdl.symmetry.checks import SymmetryCheck


STEPS, NOTES = np.arange(4), (Note("Mind this & <that>.", is_fault=True), Note("And this."))
FALLING, RISING = np.array([1.0, 0.5, 0.25, 0.125]), np.array([0.0, 1e-7, 2e5, np.nan])


def make_run():
    observe = {"loss": valley_loss, "point": lambda p, args: jnp.stack([p["x"], p["y"]])}
    return eomdl.descend(valley_loss, VALLEY, optax.sgd(0.1), 3, observe=observe)


def make_comparison():
    distance, differences = {"flow": RISING[:3].repeat([1, 1, 2])}, {"flow": {"loss": FALLING}, "bare": {}}
    blocks = {"flow": {"x": FALLING, "y": RISING}}
    return eomdl.Comparison(
        STEPS, 0.1 * STEPS, FALLING, distance, blocks, {"flow": FALLING}, differences, NOTES
    )


def make_predicted():
    return errors.predict_error(eomdl.GradientFlow(valley_loss, 0.1), VALLEY, 3)


def make_choice():
    flow = eomdl.GradientFlow(valley_loss, 0.1)
    candidate = Candidate("gradient flow", "gradient flow", "Tsit5", flow, {}, 6, 0.1, 0.2, 0.3, 7.0)
    return choice.Choice(candidate, (candidate,), 0.5, 100.0, NOTES)


def make_edge(steps=()):
    columns, along = {"a": FALLING, "b": 1 - FALLING}, np.full(len(steps), 0.1)
    return telemetry.EdgeReport(
        *(np.array(steps, int), *[along] * 5, np.array(steps, int), STEPS),
        *(np.stack([FALLING, RISING], 1), np.full(4, 2.0), np.zeros((4, 2))),
        *(np.array([[True, True]] * 3 + [[False, True]]), STEPS, columns, FALLING, columns),
        mismatch=0.25,
    )


def make_components():
    return geometry.PathComponents(
        np.array([0.75, 0.25]), np.outer(FALLING, [1.0, 0.1]), {"x": np.eye(2)}, {"x": np.zeros(2)}
    )


MAKE = {
    "Trajectory": make_run,
    "Comparison": make_comparison,
    "PredictedError": make_predicted,
    "Choice": make_choice,
    "EdgeReport": make_edge,
    "PathComponents": make_components,
    "Convergence": lambda: Convergence(FALLING, STEPS, FALLING**2, 1e-9 * FALLING),
    "LargestRate": lambda: errors.LargestRate(
        0.1, 0.5, "x", {"x": 0.2, "y": np.inf}, FALLING, FALLING, RISING, 0.3, NOTES
    ),
    "SpectralDensity": lambda: curvature.SpectralDensity(
        np.array([[0.0, 1.0], [0.2, 1.1]]), np.full((2, 2), 0.5), 9
    ),
    "OverBatches": lambda: OverBatches(
        np.array([[2.0, 1.0], [3.0, 0.5]]), np.array([[True, True], [True, False]])
    ),
    "Conservation": lambda: symmetry.Conservation(
        "scaling of w",
        STEPS,
        np.stack([FALLING, FALLING], 1),
        {"exact": np.ones((4, 2))},
        {"flow": np.zeros((4, 2))},
    ),
    "SymmetryCheck": lambda: SymmetryCheck(
        True, 1e-17, 0.0, 1e-8, symmetry.Scaling([("a.w", 1), ("a.b", 0)], [("b.w", 0)])
    ),
    "PathShape": lambda: geometry.PathShape(STEPS, FALLING, FALLING, RISING, RISING),
    "Secants": lambda: geometry.Secants(
        STEPS, *[FALLING] * 6, RISING, random_gamma=np.ones((4, 3)), notes=NOTES
    ),
    "IntrinsicDimension": lambda: geometry.IntrinsicDimension(2.1, 0.1, 2.0, 100, "TwoNN", NOTES),
    "LossPlane": lambda: geometry.LossPlane(np.arange(3.0), np.arange(2.0), np.ones((2, 3)) + np.arange(3.0)),
    "RegionsOnLine": lambda: RegionsOnLine(np.array([0.2, 0.4]), 0.5, 1e-10),
    "RegionMap": lambda: geometry.RegionMap(
        np.array([[0, 1], [1, 1]]), np.arange(2.0), np.arange(2.0), np.zeros((3, 2))
    ),
}
NO_PICTURE = {"RegionsOnLine", "SymmetryCheck"}
NO_FILE = {"Choice"}  # its flows hold the loss, a function
OWN_FRAME = {
    "Comparison": 2 * 4,
    "LargestRate": 4,
}  # one row for each step, where the table has one for each model or block


@pytest.fixture(scope="module", params=MAKE)
def result(request):
    return MAKE[request.param]()


def name_of(result):
    return type(result).__name__


def assert_same(actual, expected):
    """Equal in type and in every number, text and structure."""
    assert type(actual) is type(expected)
    if isinstance(expected, eomdl.Trajectory):
        assert_identical(actual, expected)
    elif dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            assert_same(getattr(actual, field.name), getattr(expected, field.name))
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        assert_same(list(actual.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)
    else:
        assert actual == expected
        assert getattr(actual, "is_fault", None) == getattr(expected, "is_fault", None)


def test_every_type_of_result_is_listed():
    found: set[type] = set()
    kinds = [AbstractResult]
    while kinds:
        below = [kind for kind in kinds.pop().__subclasses__() if kind.__module__.startswith("eomdl.")]
        found.update(below)
        kinds += below
    assert {kind.__name__ for kind in found} == set(MAKE)


# -------------------------------------------------------------------- table and frame


def test_the_table_has_every_row_and_every_note(result):
    text = result.table(rows=10)
    assert str(result) == (text if name_of(result) != "Trajectory" else repr(result))
    assert text.startswith(result.verdict)
    tables = result._tables()
    assert tables
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    for table in tables:
        assert table.title in text
        for row in table.rows:
            assert [format_cell(cell, i in table.fractions) for i, cell in enumerate(row)] in lines
    assert [line for line in text.splitlines() if line.startswith("! ")] == [
        f"! {note}" for note in result.notes
    ]
    assert all(isinstance(note, Note) for note in result.notes)


def test_the_frame_has_the_rows(result):
    frame = result.to_frame()
    if name_of(result) in OWN_FRAME:
        assert len(frame) == OWN_FRAME[name_of(result)]
        return
    for table in result._tables():
        assert set(table.columns) <= set(frame.columns)
        for i, column in enumerate(table.columns):
            cells = [np.nan if row[i] is None else row[i] for row in table.rows]
            np.testing.assert_array_equal(frame[column].to_numpy(), np.array(cells))


def test_two_tables_make_one_frame():
    frame = make_edge(steps=(1, 9)).to_frame()
    assert sorted(frame["step"]) == [0, 1, 2, 3, 9]
    assert frame.set_index("step").loc[1, ["loss", "eta lambda"]].tolist() == [0.1, 0.5]
    assert np.isnan(frame.set_index("step").loc[9, "eta lambda"])
    assert len(make_edge().to_frame()) == 4


def test_a_long_table_is_shortened_and_says_so():
    series = series_table("numbers", {"step": np.arange(100)})
    assert [row[0] for row in series.few(4).rows] == [0, 33, 66, 99]
    assert [row[0] for row in dataclasses.replace(series, is_series=False).few(4).rows] == [0, 1, 2, 3]
    assert series.few(100) is series
    shown = "4 of 100 rows; `table(rows=...)` shows more."
    assert series.few(4).text().endswith(f"{shown}\n")
    assert shown in series.few(4).html()
    shape = geometry.PathShape(np.arange(100), *[np.ones(100)] * 4)
    assert "12 of 100 rows" in shape.table()
    assert "│   37 │" in shape.table(rows=100)
    with pytest.raises(ValueError, match=r"^rows: expected an integer >= 1, got 0"):
        shape.table(0)


def test_numbers_have_three_digits():
    numbers = {0.0: "0", 1.0: "1", 0.01234: "0.0123", 12345.6: "12346", 1e5: "1.00e+05", -2e-7: "-2.00e-07"}
    assert [format_number(x) for x in numbers] == list(numbers.values())
    cells = {None: "-", "a": "a", 7: "7", np.inf: "inf", True: "True"}
    assert [format_cell(x) for x in cells] == list(cells.values())
    assert format_cell(0.125, is_fraction=True) == "12.5 %"
    assert Table(("a",), ((0.5,),), fractions=(0,)).cells() == [["50 %"]]


# ------------------------------------------------------------------------- picture


def test_the_picture_is_drawn_or_refused_with_words(result):
    if name_of(result) in NO_PICTURE:
        with pytest.raises(
            ValueError, match=r"^result: expected a result that has a picture \(Choice, Comp.*got "
        ):
            result.plot()
        return
    figure = result.plot()
    assert isinstance(figure, Figure)
    assert any(axes.has_data() for axes in figure.axes)
    assert type(plot(result)) is Figure


@pytest.mark.parametrize(
    "name", ["Trajectory", "Conservation", "PathShape", "Secants", "IntrinsicDimension", "RegionMap"]
)
def test_several_results_are_drawn_in_one_picture(name):
    one = MAKE[name]()
    figure = plot({"first": one, "second": one})
    assert isinstance(figure, Figure)
    words = " ".join(
        [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
        + [axes.get_title() for axes in figure.axes]
        + [tick.get_text() for axes in figure.axes for tick in axes.get_xticklabels()]
    )
    assert "first" in words
    assert "second" in words


@pytest.mark.parametrize(
    "wrong",
    [{}, {"a": make_comparison(), "b": make_comparison()}, {"a": 1}, {"a": MAKE["PathShape"](), "b": 2}],
)
def test_other_dicts_are_refused(wrong):
    with pytest.raises(
        ValueError, match=r"^result: expected a dict \{name: result\} of one type, Conservation, "
    ):
        plot(wrong)


def test_a_user_s_result_has_a_table_and_may_register_a_picture():
    @dataclasses.dataclass(frozen=True)
    class Mine(AbstractResult):
        values: np.ndarray
        notes: tuple[Note, ...] = ()

        def _tables(self):
            return (series_table("mine", {"value": self.values}),)

    assert "0.125" in Mine(FALLING).table()
    with pytest.raises(ValueError, match="got Mine"):
        Mine(FALLING).plot()
    plot.register(Mine, lambda result: Figure())
    assert isinstance(Mine(FALLING).plot(), Figure)


# ------------------------------------------------------------------------ notebook


class Tags(html.parser.HTMLParser):
    """Follows what is opened and closed."""

    def __init__(self):
        html.parser.HTMLParser.__init__(self)
        self.open, self.seen, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_notebook_shows_tables_notes_and_picture(result):
    page = Tags()
    page.feed(result._repr_html_())
    page.close()
    assert not page.open
    tags = [tag for tag, _ in page.seen]
    tables = result._tables()
    assert tags.count("table") == len(tables)
    assert tags.count("tr") == len(tables) + sum(len(table.rows) for table in tables)
    assert all(note in page.text for note in result.notes)
    assert result.verdict in page.text
    images = [attributes for tag, attributes in page.seen if tag == "img"]
    assert len(images) == (name_of(result) not in NO_PICTURE)
    for image in images:
        _, _, data = image["src"].partition("base64,")
        assert base64.b64decode(data)[:4] == b"\x89PNG"


def test_a_notebook_without_matplotlib_shows_the_table(monkeypatch):
    load = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    shown = make_comparison()._repr_html_()
    assert "<table>" in shown
    assert "<img" not in shown
    with pytest.raises(ModuleNotFoundError):
        make_comparison().plot()


NAMES = ("[red]", "[/red]", "_hidden", "a$b$c", r"$\no formula$", "<b>", ":smile:")


def legends(figure):
    found = [axes.get_legend() for axes in figure.axes]
    return {text.get_text() for legend in found if legend for text in legend.get_texts()}


@pytest.mark.parametrize("make", ["comparison", "runs", "shapes", "predicted", "edge"])
def test_names_are_shown_as_they_are(make):
    """No markup, no formula, and an entry in the legend for each, drawn."""
    if make == "comparison":
        c = make_comparison()
        columns = dict.fromkeys(NAMES, FALLING)
        c = dataclasses.replace(
            c,
            distance=columns,
            block_distance={name: {} for name in NAMES},
            ode_error={},
            differences={name: {name: FALLING} for name in NAMES},
        )
        rows = c.table(rows=20)
        assert all(f"│ {name} " in rows for name in NAMES)
        assert html.escape("<b>") in c._repr_html_()
        figure = c.plot()
        drawn = {axes.get_ylabel() for axes in figure.axes}
        assert {f"|difference in {as_label(name)}|" for name in NAMES} <= drawn
    elif make == "runs":
        run = make_run()
        run = dataclasses.replace(run, observables=dict.fromkeys(NAMES[:3], FALLING))
        figure = eomdl.plotting.plot(dict.fromkeys(NAMES, run))
    elif make == "shapes":
        figure = eomdl.plotting.plot(dict.fromkeys(NAMES, MAKE["PathShape"]()))
    elif make == "predicted":
        figure = dataclasses.replace(make_predicted(), block_norm=dict.fromkeys(NAMES, FALLING)).plot()
    else:
        report = dataclasses.replace(make_edge(), fractions=dict.fromkeys(NAMES[:6], FALLING))
        figure = report.plot()
    names = NAMES[:6] if make == "edge" else NAMES
    assert set(names) <= {label.replace(r"\$", "$").strip() for label in legends(figure)}
    figure.savefig(io.BytesIO())  # a name that were read as a formula would raise


# ---------------------------------------------------------------------------- file


def test_a_result_comes_back_from_its_file(result, tmp_path):
    path = tmp_path / "result.npz"
    kind = type(result)
    if name_of(result) in NO_FILE:
        with pytest.raises(
            ValueError, match=r"^Choice\.chosen: expected numbers, text and arrays.* got Candidate"
        ):
            result.save(path)
        assert not path.exists()
        return
    result.save(path)
    loaded = kind.load(path)
    assert_same(loaded, result)
    assert loaded.table() == result.table()
    assert_same(loaded.notes, result.notes)
    # Another type of result says that this is not its file.
    other = geometry.LossPlane if kind is not geometry.LossPlane else geometry.RegionMap
    with pytest.raises(
        ValueError, match=rf"^path: expected a whole file of format 'eomdl\.{other.__name__} 1'"
    ):
        other.load(path)


def test_a_change_of_one_number_is_seen():
    shape = MAKE["PathShape"]()
    with pytest.raises(AssertionError):
        assert_same(dataclasses.replace(shape, length=shape.length + np.array([0, 0, 0, 1e-16])), shape)
    with pytest.raises(AssertionError):
        assert_same((Note("a"),), (Note("a", is_fault=True),))


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "comparison.npz"
    make_comparison().save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"^path: expected a whole file of .*comparison\.npz"):
        eomdl.Comparison.load(path)


WRONG_ARRAYS = (
    lambda x: np.full(x.shape, "a"),
    lambda x: x * 1j,
    lambda x: x[None],
    lambda x: np.concatenate([x, x, np.ones_like(x[:1])] if x.size else [np.ones((3, *x.shape[1:]))]),
)
# Axes that no other field has.
ALONE = {("PathComponents", "scores"), ("RegionsOnLine", "breakpoints")}


def test_a_field_of_another_kind_shape_or_name_is_refused(result, tmp_path, monkeypatch):
    """Every array of every result, and every field: a file that was changed by hand says where."""
    if name_of(result) not in NO_FILE | {"Trajectory"}:  # test_files.py has those
        change_every_field(result, tmp_path, monkeypatch)


def change_every_field(result, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda number: None)  # many small files
    path, kind, arrays = tmp_path / "changed.npz", type(result), {}
    value = encode(result._pack(), "", arrays)
    hints, ways = typing.get_type_hints(kind), itertools.cycle(WRONG_ARRAYS[::-1])
    # One with a default is new: files of before have none of it.
    missing = dataclasses.MISSING
    required = {f.name for f in dataclasses.fields(kind) if f.default is missing is f.default_factory}

    def refused(arrays, value):
        write_npz(path, arrays, {"format": kind._names()[-1], "value": value})
        with pytest.raises(ValueError, match=r"^path: expected .*changed\.npz"):
            kind.load(path)

    def fields_with(name, content):
        return ["dict", [[key, content if key == name else item] for key, item in value[1]]]

    for name, item in value[1]:
        if name in required:
            refused(arrays, ["dict", [field for field in value[1] if field[0] != name]])
        refused(arrays, ["dict", [*value[1], [name, item]]])
        if hints[name] is not typing.Any:
            refused({}, fields_with(name, {"by": "hand"}))
        # Each array is changed in two of the ways, and over the results all ways meet all kinds.
        changes = [next(ways), next(ways)] if isinstance(item, list) and item[0] == "array" else []
        for change in changes:
            if change is not WRONG_ARRAYS[-1] or (name_of(result), name) not in ALONE:
                refused({**arrays, item[1]: change(arrays[item[1]])}, value)
    refused({**arrays, "extra": np.ones(1)}, value)
    if "notes" in [name for name, _ in value[1]]:
        refused(arrays, fields_with("notes", ["tuple", ["no note"]]))


def test_a_comparison_of_models_that_are_not_there_is_refused(tmp_path):
    path, made = tmp_path / "changed.npz", make_comparison()
    for change in (
        dict(distance={"other": FALLING}),
        dict(ode_error={"other": FALLING}),
        dict(distance={}),
        dict(differences={"flow": {"loss": FALLING[:3]}}),
    ):
        arrays: dict = {}
        value = encode({**vars(made), **change}, "", arrays)
        write_npz(path, arrays, {"format": "eomdl.Comparison 2", "value": value})
        with pytest.raises(ValueError, match=r"^path: expected the contents of a Comparison.*changed\.npz"):
            eomdl.Comparison.load(path)


def test_a_path_that_is_a_number_is_refused_and_closes_nothing():
    reader, writer = os.pipe()
    for kind in (eomdl.Comparison, eomdl.Trajectory, geometry.LossPlane):
        with pytest.raises(ValueError, match=r"^path: expected a path"):
            kind.load(reader)
    os.close(writer)
    os.close(reader)


def test_what_no_file_can_hold_is_named():
    for value in (lambda: 0, {"a": [object()]}, {1.5: 1}):
        with pytest.raises(ValueError, match=r"^here.*: expected numbers, text and arrays"):
            encode(value, "here", {})


def write_first_format(path):
    """What version 0.1 wrote of a comparison."""
    c = make_comparison()
    arrays = {"steps": c.steps, "times": c.times, "travelled": c.travelled}
    index = {
        "distance": [("flow", "")],
        "ode_error": [("flow", "")],
        "block_distance": [("flow", "x"), ("flow", "y")],
        "differences": [("flow", "loss")],
    }
    arrays |= {"distance:0": c.distance["flow"], "ode_error:0": c.ode_error["flow"]}
    arrays |= {f"block_distance:{i}": x for i, x in enumerate(c.block_distance["flow"].values())}
    arrays |= {"differences:0": c.differences["flow"]["loss"]}
    meta = {"format": "eomdl.Comparison 1", "models": c.models, "index": index, "notes": c.notes}
    write_npz(path, arrays, meta)
    return c


def test_a_comparison_of_the_first_format_is_read(tmp_path):
    written = write_first_format(tmp_path / "old.npz")
    loaded = eomdl.Comparison.load(tmp_path / "old.npz")
    plain = tuple(Note(note) for note in written.notes)  # that format kept no severity
    assert_same(loaded, dataclasses.replace(written, notes=plain))


# --------------------------------------------------------------------------- notes


def test_a_note_is_its_text_with_a_severity():
    note = Note("Too far.", is_fault=True)
    assert note == "Too far."
    assert note.about("flow") == "flow: Too far."
    assert note.about("flow").is_fault
    assert not Note("So it is.").is_fault
    again = pickle.loads(pickle.dumps(note))
    assert_same(again, note)


def test_a_batch_of_runs_has_no_table():
    batch = jax.tree.map(lambda x: np.stack([np.asarray(x)] * 2), make_run())
    assert batch._tables() == ()
    with pytest.raises(ValueError, match=r"^result: expected one Trajectory, got a batch"):
        batch.to_frame()
    with pytest.raises(ValueError, match=r"^result: expected a run with scalar observables"):
        batch.plot()
    assert "<table>" not in batch._repr_html_()

"""The reproductions: data, claims, command line, and what one leaves. (.ci/run runs all of them at smoke size.)"""

import dataclasses
import gzip
import json
import struct

import jax
import numpy as np
import pandas as pd
import pytest

from paper_repro import claims, harness
from paper_repro.__main__ import main
from paper_repro.claims import Claim
from paper_repro.data import load, read_idx
from paper_repro.pictures import panel


REPRODUCTIONS = harness.discover()


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 2048 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 4, 5)).astype(np.uint8)
    labels = (np.arange(40) % 10).astype(np.uint8)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(images)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(_idx(labels))
    return tmp_path, images, labels


def test_idx_files_gzipped_or_not(idx_folder):
    folder, images, labels = idx_folder
    inputs, targets = load(folder, 40)
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_allclose(inputs, images.reshape(40, 20)[order] / 255)
    np.testing.assert_array_equal(targets, labels[order])


def test_idx_errors_say_what_is_wrong(idx_folder, tmp_path):
    _, images, _ = idx_folder
    whole = _idx(images)
    path = tmp_path / "broken"
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"expected {len(whole)} bytes.*got {len(whole) - 1}"):
        read_idx(path, 2051)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="magic number 2049"):
        read_idx(path, 2049)
    path.write_bytes(whole[:7])
    with pytest.raises(ValueError, match="header of 16 bytes, got 7"):
        read_idx(path, 2051)
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(ValueError, match=r"cut\.gz: expected a whole gzip file"):
        read_idx(cut, 2051)
    for name, content in {
        "no gzip at all": whole,
        "another checksum": gzip.compress(whole)[:-8] + bytes(8),
        "another body": gzip.compress(whole)[:20] + bytes(40) + gzip.compress(whole)[60:],
    }.items():
        (tmp_path / f"{name}.gz").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.gz: expected a whole gzip file.*download it again"):
            read_idx(tmp_path / f"{name}.gz", 2051)
    # Sizes whose product is 2^64, which is 0 in 64 bits.
    huge = struct.pack(">4I", 2051, 2**31, 2**31, 4)
    path.write_bytes(huge)
    with pytest.raises(ValueError, match=rf"broken: expected {2**64 + 16} bytes for shape"):
        read_idx(path, 2051)
    path.write_bytes(_idx(np.zeros((0, 4, 5), np.uint8)))
    path.rename(tmp_path / "train-images-idx3-ubyte")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: expected images, got shape"):
        load(tmp_path, 1)
    with pytest.raises(ValueError, match=r"subset: expected 1 to 1797 images, got 2000"):
        load(None, 2000)
    with pytest.raises(ValueError, match="expected a folder with a file train-images"):
        load(tmp_path / "nowhere", 10)


def test_reproductions_are_files_and_say_what_they_are():
    files = [path.stem for path in (harness.ROOT / "papers").glob("[a-z]*.py")]
    assert sorted(files) == sorted(name.replace("-", "_") for name in REPRODUCTIONS)
    for r in REPRODUCTIONS.values():
        assert r.title
        assert r.setting
        assert r.source
        assert r.seconds > 0
        assert type(r.smoke) is type(r.full)
        assert r.smoke != r.full
    lengths = [len((harness.ROOT / "papers" / f"{name}.py").read_text().splitlines()) for name in files]
    assert max(lengths) <= 200


@pytest.mark.parametrize(
    ("holds", "claim"),
    [
        (True, claims.law("a law", [1e-9, 1e-8], 1e-6)),
        (False, claims.law("a law", [1e-9, np.nan], 1e-6)),
        (False, claims.gain("gain", [1.0, np.nan], [3.0, 5.0])),
        (False, claims.orders("orders", {"a": 1.0, "b": np.nan}, {"a": 1, "b": 2}, within=0.1)),
        (False, claims.law("a law", [1e-9, 1e-5], 1e-6)),
        (True, claims.orders("orders", {"a": 1.02, "b": 2.0}, {"a": 1}, within=0.1)),
        (False, claims.orders("orders", {"a": 1.02, "b": 2.2}, {"a": 1, "b": 2}, within=0.1)),
        (True, claims.gain("gain", [1.0, 2.0], [3.0, 5.0], least=2)),
        (False, claims.gain("gain", [1.0, 2.0], [3.0, 3.0], least=2)),
        (True, claims.falling("falls", {"a": 2.0, "b": 1.0}, "Values")),
        (False, claims.falling("falls", {"a": 2.0, "b": 2.0}, "Values")),
        (False, claims.falling("falls", {"a": 2.0, "b": 1.0}, "Values", notes="It diverged.")),
        (True, claims.close("close", 1.01, 1.0, within=0.02)),
        (False, claims.close("close", 0.97, 1.0, within=0.02)),
        (True, claims.share("share", [0.009], 0.01)),
        (False, claims.law("a law", [], 1e-6)),
        (False, claims.share("share", [0.011], 0.01)),
    ],
)
def test_claims_of_the_common_forms(holds, claim):
    assert claim.holds is holds
    assert "<lambda>" not in claim.text + claim.measured
    assert any(character.isdigit() for character in claim.measured.replace("nan", "0"))


def test_unknown_name_suggests_the_nearest(capsys):
    assert main(["nec-translatoin"]) == 2
    assert "nec-translation" in capsys.readouterr().out


def test_list_runs_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--list", "--out", str(tmp_path / "out")]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in REPRODUCTIONS)
    assert not (tmp_path / "out").exists()


def test_wrong_numbers_are_named(capsys):
    assert main(["--seeds", "0"]) == 2
    assert "--seeds: expected an integer >= 1, got 0" in capsys.readouterr().out


@pytest.fixture
def fakes(monkeypatch):
    """Every reproduction replaced by one that only says that it ran."""
    ran = []

    def named(name):
        def measure(size, images):
            ran.append(name)
            return {"table": pd.DataFrame({"x": [1.0]})}

        def pictures(tables):
            figure, axes = panel("x", "y")
            axes.plot([0, 1], label="a line")
            return {"line": figure}

        fake = {
            "measure": measure,
            "claims": lambda tables: [Claim("it holds", "1", True)],
            "pictures": pictures,
        }
        return dataclasses.replace(REPRODUCTIONS[name], **fake)

    found = {name: named(name) for name in REPRODUCTIONS}
    monkeypatch.setattr(harness, "discover", lambda: found)
    return ran


def test_without_a_name_the_main_ones_run_and_all_with_all(fakes, tmp_path):
    main_ones = [name for name, r in REPRODUCTIONS.items() if r.main]
    assert main(["--out", str(tmp_path)]) == 0
    assert fakes == main_ones
    assert all(name.startswith("nec-") for name in main_ones)
    # What is done is not run again ...
    assert main(["--all", "--out", str(tmp_path)]) == 0
    assert sorted(fakes) == sorted(REPRODUCTIONS)
    # ... unless asked, or with other options.
    fakes.clear()
    assert main(["nec-sgd", "--out", str(tmp_path)]) == 0
    assert fakes == []
    assert main(["nec-sgd", "--fresh", "--out", str(tmp_path)]) == 0
    assert main(["nec-sgd", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert fakes == ["nec-sgd"] * 2


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(fakes, tmp_path, monkeypatch, capsys):
    def stopped(tables):
        raise KeyboardInterrupt

    known = harness.discover()
    broken = known | {"nec-sgd": dataclasses.replace(known["nec-sgd"], pictures=stopped)}
    with monkeypatch.context() as patch:
        patch.setattr(harness, "discover", lambda: broken)
        assert main(["nec-scale", "nec-sgd", "--out", str(tmp_path)]) == 130
    assert "the same command continues" in capsys.readouterr().out
    assert "Weight-norm rates" in (tmp_path / "report.html").read_text()
    assert main(["nec-scale", "nec-sgd", "--out", str(tmp_path)]) == 0
    assert fakes == ["nec-scale", "nec-sgd", "nec-sgd"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", b'{"name": "nec-'),
        ("result.json", b'{"options": {}}'),
        ("result.json", b"[]"),
        ("result.json", b"\xff\xfe"),
        ("table.csv", b""),
        ("line.svg", None),
    ],
)
def test_a_damaged_result_is_named_and_how_to_go_on(fakes, tmp_path, capsys, name, content):
    assert main(["nec-sgd", "--out", str(tmp_path)]) == 0
    path = tmp_path / "nec-sgd" / name
    path.unlink() if content is None else path.write_bytes(content)
    capsys.readouterr()
    assert main(["nec-sgd", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().out.replace("\n", "")
    assert str(path) in said
    assert "--fresh` runs it again" in said
    assert main(["nec-sgd", "--fresh", "--out", str(tmp_path)]) == 0
    assert main(["nec-sgd", "--out", str(tmp_path)]) == 0


def test_a_result_that_is_being_written_is_not_there(fakes, tmp_path, monkeypatch):
    """A run that is killed in writing its record begins again."""

    def killed(record, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(harness.json, "dumps", killed)
        assert main(["nec-sgd", "--out", str(tmp_path)]) == 130
    assert main(["nec-sgd", "--out", str(tmp_path)]) == 0
    assert fakes == ["nec-sgd"] * 2
    assert not list(tmp_path.rglob("*.part"))


def test_claims_not_for_the_smoke_size_or_single_precision(fakes, tmp_path, monkeypatch):
    known = harness.discover()
    both = [Claim("small too", "1", False), Claim("full only", "1", False, full_only=True)]
    r = dataclasses.replace(known["nec-sgd"], claims=lambda tables: both)
    full, smoke, single = (
        harness.run(r, harness.Options(**options), tmp_path)
        for options in ({}, {"smoke": True}, {"float32": True})
    )
    assert [c.holds for c in full.claims] == [False, False]
    assert [c.holds for c in smoke.claims] == [False, None]
    assert [c.holds for c in single.claims] == [None, None]


def test_a_reproduction_leaves_claims_tables_and_pictures(tmp_path):
    """Exit status 0 means that every claim asserted at this size holds."""
    name = "development"
    with jax.numpy_rank_promotion("allow"):  # as a user has it
        assert main([name, "--smoke", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / name / "result.json").read_text())
    assert any(claim["holds"] for claim in record["claims"])
    assert all(claim["holds"] is not False for claim in record["claims"])
    assert record["environment"]["jax"]
    assert record["options"]["smoke"]
    assert all((tmp_path / name / f"{table}.csv").exists() for table in record["tables"])
    assert all((tmp_path / name / f"{picture}.svg").exists() for picture in record["pictures"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure><svg") == len(record["pictures"])
    assert 'aria-label="' in page

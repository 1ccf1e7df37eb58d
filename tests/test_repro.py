"""The reproductions: data, command line, and what one leaves. (.ci/run runs all of them at smoke size.)"""

import dataclasses
import gzip
import json
import struct

import jax
import numpy as np
import pandas as pd
import pytest

from paper_repro.__main__ import main
from paper_repro.data import load, read_idx
from paper_repro.registry import MAIN, REPRODUCTIONS
from paper_repro.reproduction import Claim


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
    with pytest.raises(ValueError, match="truncated"):
        read_idx(cut, 2051)
    with pytest.raises(ValueError, match=r"subset: expected 1 to 1797 images, got 2000"):
        load(None, 2000)
    with pytest.raises(ValueError, match="expected a folder with a file train-images"):
        load(tmp_path / "nowhere", 10)


def test_unknown_name_suggests_the_nearest(capsys):
    assert main(["nec-translatoin"]) == 2
    assert "nec-translation" in capsys.readouterr().out


def test_list_runs_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--list", "--out", str(tmp_path / "out")]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in REPRODUCTIONS)
    assert not (tmp_path / "out").exists()


def test_without_a_name_the_main_ones_run_and_all_with_all(monkeypatch, tmp_path):
    ran = []

    def named(name):
        def run(config):
            ran.append(name)
            return {"table": pd.DataFrame({"x": [1.0]})}, [Claim("it holds", "yes", True)]

        return dataclasses.replace(REPRODUCTIONS[name], run=run, plot=lambda tables: {})

    fakes = {name: named(name) for name in REPRODUCTIONS}
    monkeypatch.setattr("paper_repro.registry.REPRODUCTIONS", fakes)
    assert main(["--out", str(tmp_path)]) == 0
    assert ran == list(MAIN)
    ran.clear()
    assert main(["--all", "--out", str(tmp_path)]) == 0
    assert ran == list(REPRODUCTIONS)


def test_a_reproduction_leaves_claims_tables_and_pictures(tmp_path):
    """Exit status 0 means that every claim asserted at this size holds."""
    name = "development"
    with jax.numpy_rank_promotion("allow"):  # as a user has it
        assert main([name, "--smoke", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / name / "result.json").read_text())
    assert any(claim["holds"] for claim in record["claims"])
    assert all(claim["holds"] is not False for claim in record["claims"])
    assert record["environment"]["jax"] and record["config"]["smoke"]
    assert list((tmp_path / name).glob("*.png")) and list((tmp_path / name).glob("*.csv"))
    assert "data:image/png;base64," in (tmp_path / "report.html").read_text()

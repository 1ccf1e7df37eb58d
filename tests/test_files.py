"""Files and folders of runs: every flipped bit is found, every name and dtype comes back, one folder is one run."""

import enum
import json
import os
import signal
import subprocess
import sys
import textwrap
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import VALLEY, assert_identical, valley_loss

import eomdl
from eomdl.storage.files import write_npz


ADAM, SGD = optax.adam(0.02), optax.sgd(0.1)


def sum_of_squares(params, args):
    return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def run():
    return eomdl.descend(valley_loss, VALLEY, ADAM, 3, observe={"loss": valley_loss})


def load(path):
    return eomdl.Trajectory.load(path)


# -------------------------------------------------------------------- damage


def test_every_flipped_bit_is_found_or_changes_nothing(run, tmp_path):
    path = tmp_path / "run.npz"
    run.save(path)
    data = path.read_bytes()
    broken = tmp_path / "broken.npz"
    found: list[str] = []
    directory = data.index(b"PK\x01\x02")
    # The directory of the zip, where one bit used to drop members without a word, is looked at closely.
    bits = [8 * i + j for i in range(directory, len(data)) for j in range(i % 3, 8, 3)]
    bits += [8 * i + i % 8 for i in range(0, directory, 11)]
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        broken.write_bytes(flipped)
        try:
            loaded = load(broken)
        except ValueError as error:
            found.append(str(error))
            continue
        assert_identical(loaded.observables, run.observables)
        assert_identical(
            (loaded.params, loaded.final_params, loaded.steps), (run.params, run.final_params, run.steps)
        )
        assert loaded.stats.gradient_evaluations == 3
        assert loaded.result == run.result
    assert all("broken.npz" in message for message in found)
    assert len(found) > len(bits) / 4


def meta_of(path):
    with np.load(path) as file:
        text = json.loads(file["text"].tobytes())
        arrays = {name: file[member] for name, (member, *_) in text["arrays"].items()}
    return arrays, text["meta"]


HAND_MADE = {
    "no observables": lambda arrays, meta: meta.pop("observables"),
    "an array less": lambda arrays, meta: arrays.pop("params:0"),
    "steps in words": lambda arrays, meta: arrays.update({"steps:0": np.array(["a"] * 4)}),
    "steps that go back": lambda arrays, meta: arrays.update({"steps:0": np.array([0, 2, 1, 3])}),
    "a row less": lambda arrays, meta: arrays.update({"params:0": arrays["params:0"][:3]}),
    "a step before the first": lambda arrays, meta: arrays.update({"end.step:0": np.array(-1)}),
    "a step in words": lambda arrays, meta: arrays.update({"end.step:0": np.array("three")}),
    "another result": lambda arrays, meta: meta.update(result=77),
    "a result in words": lambda arrays, meta: meta.update(result="fine"),
    "a number more": lambda arrays, meta: meta["stats"].update(speed=3),
    "numbers in words": lambda arrays, meta: meta["stats"].update(num_steps="many"),
    "a list of numbers": lambda arrays, meta: meta.update(stats=[1, 2]),
    "diagnostics without limits": lambda arrays, meta: meta.update(
        {"diagnostics": {"x": []}, "diagnostics values": ["dict", [["x", "*"]]]}
    ),
    "another structure": lambda arrays, meta: meta.update(
        params=["dict", [["x", "*"], ["y", "*"], ["z", "*"]]]
    ),
    "a structure in words": lambda arrays, meta: meta.update(params="two arrays"),
    "members of no observable": lambda arrays, meta: meta.update(per_member=["none"]),
    "no format": lambda arrays, meta: meta.pop("format"),
    "an older format": lambda arrays, meta: meta.update(format="eomdl.Trajectory 3"),
}


@pytest.mark.parametrize("kind", HAND_MADE)
def test_a_whole_file_of_wrong_contents_is_a_value_error(run, tmp_path, kind):
    path = tmp_path / "hand_made.npz"
    run.save(path)
    arrays, meta = meta_of(path)
    write_npz(path, arrays, meta)
    assert_identical(load(path).params, run.params)
    HAND_MADE[kind](arrays, meta)
    write_npz(path, arrays, meta)
    with pytest.raises(ValueError, match=r"^path: expected .*got .*hand_made\.npz"):
        load(path)


def test_an_array_put_in_place_of_another_is_found_by_its_checksum(run, tmp_path):
    path = tmp_path / "edited.npz"
    run.save(path)
    with np.load(path) as file:
        members = {name: file[name] for name in file.files}
    # NumPy writes a sound zip: only the library's own checksums know what belongs in it.
    np.savez(path, **members)
    assert_identical(load(path).params, run.params)
    for name, array in members.items():
        expected = "checksum of the text" if name in ("text", "checksum") else "checksum of '"
        np.savez(path, **{**members, name: np.frombuffer(array.tobytes()[::-1], array.dtype)})
        if array.tobytes() != array.tobytes()[::-1]:
            with pytest.raises(ValueError, match=rf"^path: expected .*edited\.npz.*{expected}"):
                load(path)


def test_a_compressed_file_is_refused(run, tmp_path):
    path = tmp_path / "run.npz"
    run.save(path)
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("zeros.npy", bytes(10**7))
    assert bomb.stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"bomb\.npz.*compressed"):
        load(bomb)


# ------------------------------------------------------------ names and dtypes


def sums(*names):
    return {name: valley_loss for name in names}


def test_names_of_observables_come_back(tmp_path):
    observe = sums("loss", "loss.npy", "a/b", "nul\0", "ü", "", "text", "meta", "steps:0")
    run = eomdl.descend(valley_loss, VALLEY, SGD, 2, observe=observe)
    run.save(tmp_path / "run.npz")
    assert_identical(load(tmp_path / "run.npz").observables, run.observables)


@pytest.mark.parametrize("name", [1, b"loss", None, ("a", 1)])
def test_a_name_that_is_no_string_is_refused_before_the_first_step(name):
    with pytest.raises(ValueError, match=r"^observe: expected names that are strings, got"):
        eomdl.descend(valley_loss, VALLEY, SGD, 2, observe={name: valley_loss})


class Layer(enum.IntEnum):
    FIRST = 1


KEYS = {
    "bytes": {b"w": 1.0, b"\xff": 2.0},
    "integers of NumPy": {np.int64(3): 1.0, np.int64(0): 2.0, np.int64(1): 0.0},
    "integer enums": {Layer.FIRST: 1.0},
    "tuples": {("a", 0): 1.0, ("a", 1): 2.0},
    "tuples of bytes": {(b"a", (1, "x")): 1.0},
    "floats": {0.1: 1.0, 1e300: 2.0},
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_parameters_come_back(tmp_path, kind):
    params = jax.tree.map(lambda x: x * jnp.ones(2), KEYS[kind])
    store = eomdl.Checkpoints(tmp_path, [2])
    whole = eomdl.descend(sum_of_squares, params, ADAM, 5, checkpoints=store)
    checkpoint = store.at(2)
    assert set(checkpoint.final_params) == set(params)
    for key, value in whole.at(2).items():
        np.testing.assert_array_equal(checkpoint.final_params[key], value)
    resumed = eomdl.descend(sum_of_squares, params, ADAM, 5, resume=store.latest)
    assert_identical(resumed.final_params, whole.final_params)


def test_a_module_whose_attributes_hide_a_key_resumes(tmp_path):
    """A dict key that JSON cannot say comes back by its repr, and its run goes on."""
    params = {frozenset(): jnp.ones(2)}
    store = eomdl.Checkpoints(tmp_path, [2])
    whole = eomdl.descend(sum_of_squares, params, ADAM, 5, checkpoints=store)
    assert list(store.at(2).final_params) == ["frozenset()"]
    assert_identical(
        eomdl.descend(sum_of_squares, params, ADAM, 5, resume=store.latest).final_params, whole.final_params
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_short_floats_come_back(tmp_path, dtype):
    params = {"w": jnp.ones(3, dtype), "b": jnp.zeros((), jnp.float32)}

    def loss(params, args):
        return jnp.sum((params["w"].astype(jnp.float32) - 0.5) ** 2) + params["b"] ** 2

    store = eomdl.Checkpoints(tmp_path, [2])
    whole = eomdl.descend(loss, params, SGD, 5, checkpoints=store)
    assert store.at(2).final_params["w"].dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(store.at(2).final_params["w"], whole.at(2)["w"])
    resumed = eomdl.descend(loss, params, SGD, 5, resume=store.latest)
    np.testing.assert_array_equal(resumed.final_params["w"], whole.final_params["w"])


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.noisy_sgd(0.1, 0.1, 0.5, key=jax.random.key(1)),
        optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0, impl="rbg")), optax.sgd(0.1)),
    ],
    ids=["noisy_sgd", "add_noise"],
)
def test_random_keys_come_back(tmp_path, optimizer):
    store = eomdl.Checkpoints(tmp_path, [4])
    whole = eomdl.descend(valley_loss, VALLEY, optimizer, 9, checkpoints=store)
    resumed = eomdl.descend(valley_loss, VALLEY, optimizer, 9, resume=store.latest)
    assert_identical(resumed.final_params, whole.final_params)


# ------------------------------------------------------------- one folder, one run


def descend(store, optimizer=ADAM, num_steps=40, params=VALLEY, **options):
    return eomdl.descend(valley_loss, params, optimizer, num_steps, checkpoints=store, **options)


def test_a_damaged_newest_checkpoint_is_passed_over_and_set_aside(tmp_path):
    store = eomdl.Checkpoints(tmp_path, 10)
    whole = descend(store)
    for k in (30, 40):
        path = tmp_path / f"step-{k:010d}.npz"
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(UserWarning, match=r"damaged checkpoints, going on from step 20: .*40\.npz.*30\.npz"):
        end = store.latest
    assert end.step == 20
    resumed = descend(store, resume=end)
    assert_identical(resumed.final_params, whole.final_params)
    assert list(store.steps) == [0, 10, 20, 30, 40]
    assert store.latest.step == 40
    assert len(list(tmp_path.glob("*.damaged"))) == 2


def test_a_folder_with_damaged_files_only_begins_anew(tmp_path):
    (tmp_path / "step-0000000010.npz").write_bytes(b"nothing")
    store = eomdl.Checkpoints(tmp_path, 10)
    with pytest.warns(UserWarning, match="none before is whole"):
        assert store.latest is None
    descend(store)
    assert list(store.steps) == [0, 10, 20, 30, 40]


def test_a_mislabelled_checkpoint(tmp_path):
    store = eomdl.Checkpoints(tmp_path, 10)
    descend(store)
    (tmp_path / "step-0000000020.npz").rename(tmp_path / "step-0000000050.npz")
    with pytest.raises(ValueError, match=r"expected a checkpoint of step 50, got step 20 in .*50\.npz"):
        store.at(50)


def test_another_run_is_refused(tmp_path):
    store = eomdl.Checkpoints(tmp_path, 10)
    descend(store, num_steps=20)
    other = eomdl.descend(valley_loss, VALLEY, optax.adam(0.03), 30)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")}
    with pytest.raises(ValueError, match=r"^checkpoints: .*another run"):
        descend(store, optax.adam(0.03), resume=other)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")} == before
    # What is changed on the way is a branch of the same run, and may go on where it ended.
    descend(store, optax.adam(0.03), resume=store.latest)
    assert list(store.steps) == [0, 10, 20, 30, 40]


def test_a_second_writer_is_refused_and_a_dead_one_is_not(tmp_path):
    store = eomdl.Checkpoints(tmp_path, 10)
    script = textwrap.dedent(
        f"""
        import time
        import eomdl
        with eomdl.Checkpoints({str(tmp_path)!r}).locked():
            print("locked", flush=True)
            time.sleep(100)
        """
    )
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "locked\n"
    with pytest.raises(
        ValueError, match=r"^checkpoints: expected a folder that no other run is writing to, got"
    ):
        descend(store)
    assert len(store) == 0
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    descend(store)
    assert len(store) == 5


def test_a_second_run_in_the_same_process_is_refused(tmp_path):
    store = eomdl.Checkpoints(tmp_path, 10)
    with store.locked(), pytest.raises(ValueError, match="which is locked"):
        descend(eomdl.Checkpoints(tmp_path, 10))

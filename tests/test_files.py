"""Files and folders of runs: every flipped bit is found, every name and dtype comes back, one folder is one run."""

import dataclasses
import enum
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import types
import warnings
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
    "an observable in words": lambda arrays, meta: arrays.update({"observables:0": np.array(["a"] * 4)}),
    "complex times": lambda arrays, meta: arrays.update({"times:0": arrays["times:0"] * 1j}),
    "complex parameters": lambda arrays, meta: arrays.update({"params:1": arrays["params:1"] * 1j}),
    "an array of no name": lambda arrays, meta: arrays.update({"speed:0": np.ones(4)}),
    "an array too many": lambda arrays, meta: arrays.update({"params:2": np.ones(4)}),
    "two leaves at one key": lambda arrays, meta: meta.update(params=["dict", [["x", "*"], ["x", "*"]]]),
    "a negative count": lambda arrays, meta: meta["stats"].update(gradient_evaluations=-3),
    "a count that is none": lambda arrays, meta: meta["stats"].update(num_steps=None),
    "a tolerance that is no number": lambda arrays, meta: meta["stats"].update(rtol=float("nan")),
    "a stride of 0": lambda arrays, meta: meta["stats"].update(stride=0),
    "a limit in words": lambda arrays, meta: (
        meta.update({"diagnostics": {"x": ["far", "", True]}, "diagnostics values": ["dict", [["x", "*"]]]}),
        arrays.update({"diagnostics values:0": np.ones(1)}),
    ),
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


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    for path in (tmp_path, tmp_path / "pipe.npz"):
        with pytest.raises(ValueError, match=rf"^path: expected a file, got {path}, which is"):
            load(path)


def with_text(path, change):
    """Change the text of a file, and its checksum with it."""
    with np.load(path) as file:
        members = {name: file[name] for name in file.files}
    text = change(members["text"].tobytes().decode()).encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    members |= {"text": np.frombuffer(text, np.uint8), "checksum": np.frombuffer(digest, np.uint8)}
    np.savez(path, **members)


def test_no_array_is_unpacked_twice(run, tmp_path):
    """A small file must not fill the memory: by names of one array, or by members that share their bytes."""
    path = tmp_path / "many.npz"
    run.save(path)
    with_text(path, lambda text: text)
    assert_identical(load(path).params, run.params)

    def name_many_times(text):
        whole = json.loads(text)
        whole["arrays"] |= {f"copy{i}": whole["arrays"]["steps:0"] for i in range(600)}
        return json.dumps(whole)

    with_text(path, name_many_times)
    with pytest.raises(ValueError, match=r"many\.npz.*listed"):
        load(path)
    run.save(path)
    with zipfile.ZipFile(path, "a") as file:
        file.filelist.extend(file.filelist * 100)
        file.writestr("more", b"")
    with pytest.raises(ValueError, match=r"many\.npz.*members that overlap"):
        load(path)


def test_a_key_that_is_written_twice_is_refused(run, tmp_path):
    path = tmp_path / "twice.npz"
    run.save(path)
    with_text(path, lambda text: text.replace('"events": []', '"events": [], "events": ["x"]'))
    with pytest.raises(ValueError, match=r"twice\.npz.*a key twice"):
        load(path)


def test_reading_a_structure_imports_nothing(run, tmp_path, monkeypatch):
    """A module may import what is asked of it (scipy does); a file asks modules for nothing."""
    lazy = types.ModuleType("lazy_module")
    lazy.__getattr__ = lambda name: pytest.fail(f"{name} was asked for")
    monkeypatch.setitem(sys.modules, "lazy_module", lazy)
    path = tmp_path / "run.npz"
    run.save(path)
    arrays, meta = meta_of(path)
    meta["params"][0] = "lazy_module:submodule.Class"
    write_npz(path, arrays, meta)
    assert load(path).params.kind == "lazy_module:submodule.Class"


# -------------------------------------------------------------------- writing


def other_run():
    return eomdl.descend(valley_loss, VALLEY, ADAM, 5, observe={"loss": valley_loss})


def test_two_writers_of_one_path_do_not_meet(run, tmp_path, monkeypatch):
    path, other, savez = tmp_path / "run.npz", other_run(), np.savez
    inside = []

    def savez_with_another_in_between(file, **members):
        savez(file, **members)
        if not inside:
            inside.append(True)
            other.save(path)
            assert_identical(load(path).params, other.params)

    monkeypatch.setattr(np, "savez", savez_with_another_in_between)
    run.save(path)
    assert_identical(load(path).params, run.params)
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]


def test_a_file_is_on_the_disk_before_it_has_its_name(run, tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    other_run().save(path)
    before, fsync = path.read_bytes(), os.fsync
    synced = []

    def sync(number):
        fsync(number)
        synced.append((path.read_bytes() == before, os.fstat(number).st_size))

    monkeypatch.setattr(os, "fsync", sync)
    run.save(path)
    assert synced == [(True, path.stat().st_size)]


def test_no_link_is_followed_in_writing(run, tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("of another user")
    monkeypatch.setattr("secrets.token_hex", lambda length: "abc")
    for name in ("run.npz.part", "run.npz.abc.part"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(FileExistsError, match=r"run\.npz"):
        run.save(tmp_path / "run.npz")
    assert victim.read_text() == "of another user"
    monkeypatch.undo()
    run.save(tmp_path / "run.npz")
    assert victim.read_text() == "of another user"
    assert_identical(load(tmp_path / "run.npz").params, run.params)


def test_others_may_read_what_is_written(run, tmp_path):
    run.save(tmp_path / "run.npz")
    (tmp_path / "plain").write_text("made by open")
    assert (tmp_path / "run.npz").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ------------------------------------------------------------ ends made by hand


ENDS = {
    "step -3": lambda end: dataclasses.replace(end, step=-3),
    "step 2.5": lambda end: dataclasses.replace(end, step=2.5),
    "step True": lambda end: dataclasses.replace(end, step=True),
    "parameters NaN": lambda end: eomdl.runs.End(2, None, {**end.params, "x": np.nan}),
    "parameters in words": lambda end: eomdl.runs.End(2, None, {**end.params, "x": "one"}),
    "parameters complex": lambda end: eomdl.runs.End(2, None, {**end.params, "x": 1j}),
    "stats None": lambda end: dataclasses.replace(end, stats=None),
    "stats of a negative count": lambda end: dataclasses.replace(
        end, stats=dataclasses.replace(end.stats, num_steps=-1)
    ),
}


@pytest.mark.parametrize("kind", ENDS)
def test_an_end_made_by_hand_is_checked(run, kind):
    with pytest.raises(ValueError, match=rf"^resume\.{kind.split()[0][:5]}.*: expected "):
        eomdl.descend(valley_loss, VALLEY, ADAM, 5, resume=ENDS[kind](run.end))
    by_hand = eomdl.runs.End(np.int64(3), None, dict(run.end.params))
    assert eomdl.descend(valley_loss, VALLEY, ADAM, 4, resume=by_hand).end.step == 4


def test_an_end_whose_parameters_are_not_those_of_its_state_is_refused(run):
    """A run goes on from its state: parameters changed beside it would be passed over without a word."""
    moved = dataclasses.replace(run.end, params=jax.tree.map(lambda x: x + 1e-6, run.end.params))
    with pytest.raises(ValueError, match=r"^resume\.end\.params: expected the parameters in .*without_state"):
        eomdl.descend(valley_loss, VALLEY, ADAM, 5, resume=moved)
    begun = eomdl.descend(valley_loss, VALLEY, ADAM, 5, resume=moved.without_state())
    assert_identical(begun.at(3), moved.params)


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
    with pytest.warns(
        UserWarning, match=r"no whole checkpoints, continuing from step 20: .*40\.npz.*30\.npz"
    ):
        end = store.latest
    assert end.step == 20
    with pytest.warns(UserWarning, match=r"moved aside in .*: step-0000000030\.npz\.aside, .*40\.npz\.aside"):
        resumed = descend(store, resume=end)
    assert_identical(resumed.final_params, whole.final_params)
    assert list(store.steps) == [0, 10, 20, 30, 40]
    assert store.latest.step == 40
    assert len(list(tmp_path.glob("*.aside"))) == 2


def test_a_folder_with_damaged_files_only_begins_anew(tmp_path):
    (tmp_path / "step-0000000010.npz").write_bytes(b"nothing")
    store = eomdl.Checkpoints(tmp_path, 10)
    with pytest.warns(UserWarning, match="none before is whole"):
        assert store.latest is None
    with pytest.warns(UserWarning, match="moved aside"):
        descend(store)
    assert list(store.steps) == [0, 10, 20, 30, 40]


LOOK_ALIKES = {
    "a run saved by hand": lambda path, store, run: run.save(path),
    "its last row, saved by hand": lambda path, store, run: run.rows([-1]).save(path),
    "a folder": lambda path, store, run: (path / "with").mkdir(parents=True),
    "a broken link": lambda path, store, run: path.symlink_to("nowhere"),
    "a pipe": lambda path, store, run: os.mkfifo(path),
    "the only checkpoint, damaged": lambda path, store, run: path.write_bytes(b"PK"),
}


@pytest.mark.parametrize("step", [0, 10, 15])
@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_a_look_alike_does_not_block_a_folder(tmp_path, kind, step):
    store = eomdl.Checkpoints(tmp_path, 10)
    path = tmp_path / f"step-{step:010d}.npz"
    LOOK_ALIKES[kind](path, store, descend(None, num_steps=max(step, 1)))
    (tmp_path / "step-7.npz").write_text("not even the name of one")
    (tmp_path / "step-0000000020.npz.abcd.part").write_text("of a process that was killed in writing")
    is_file = path.is_file()
    assert list(store.steps) == [step] * is_file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resume = store.latest
    assert resume is None
    with pytest.warns(UserWarning, match=rf"moved aside in .*: {path.name}\.aside$"):
        whole = descend(store, resume=resume)
    assert list(store.steps) == [0, 10, 20, 30, 40]
    assert_identical(store.latest.params, whole.final_params)
    assert {p.name for p in tmp_path.iterdir()} == {
        *(f"step-{k:010d}.npz" for k in range(0, 41, 10)),
        *(".lock", f"{path.name}.aside", "step-7.npz"),
    }


def test_what_was_moved_aside_before_is_kept(tmp_path):
    store, path = eomdl.Checkpoints(tmp_path, 40), tmp_path / "step-0000000040.npz"
    for content in ("first", "second"):
        path.write_text(content)
        with pytest.warns(UserWarning, match="moved aside"):
            descend(store, resume=store.at(0).end if len(store) > 1 else None)
        path.unlink()
    assert [(tmp_path / f"{path.name}.aside{i}").read_text() for i in ("", 1)] == ["first", "second"]


def test_a_folder_of_another_run_is_refused_and_its_damaged_files_stay(tmp_path):
    store = eomdl.Checkpoints(tmp_path, 10)
    descend(store)
    (tmp_path / "step-0000000020.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^checkpoints: expected a folder without checkpoints after step 0"):
        descend(store, optax.adam(0.03))
    assert not list(tmp_path.glob("*.aside"))


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

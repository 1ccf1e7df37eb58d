"""Which records a run has and in which chunks it is computed: NumPy only, no run is made."""

import itertools

import numpy as np
import pytest

from eomdl.runs.chunk import MAX_STEPS, data_length, plan_chunks, plan_one_chunk, saved_steps


NO_CUTS = np.array([], int)


def records(chunk):
    return chunk.of_records(chunk.steps)


def records_of(chunks):
    return np.concatenate([records(chunk) for chunk in chunks])


@pytest.mark.parametrize("save", [1, 7, 100, 3000, [5], [0, 2999], [17, 1500, 1501]])
@pytest.mark.parametrize("start", [0, 13, 3000])
def test_chunks_cover_the_run_without_a_gap(start, save):
    saved = saved_steps("save_steps", 3000, save)
    chunks = plan_chunks(start, 3000, saved, NO_CUTS, record_size=10, max_records=256)
    assert chunks[0].start == start
    assert chunks[-1].end == 3000
    for before, after in itertools.pairwise(chunks):
        assert before.end == after.start
    steps = records_of(chunks)
    assert np.all(np.diff(steps) > 0)
    kept = np.concatenate([records(c)[c.of_records(c.is_saved)] for c in chunks])
    np.testing.assert_array_equal(kept, saved[saved >= start])


@pytest.mark.parametrize("save", [1, 7, 3000])
def test_chunks_stay_within_their_room(save):
    saved = saved_steps("save_steps", 3000, save)
    chunks = plan_chunks(0, 3000, saved, NO_CUTS, record_size=10, max_records=256)
    for chunk in chunks:
        assert chunk.num_records <= 256
        assert chunk.count <= MAX_STEPS
        assert chunk.count <= data_length(chunks)
        assert len(chunk.steps_between) == 256
        np.testing.assert_array_equal(chunk.is_record, np.arange(256) < chunk.num_records)


@pytest.mark.parametrize("num_steps", [1, 20, 33, 300, 5000])
def test_the_room_for_records_does_not_depend_on_the_length(num_steps):
    def room(record_size):
        chunks = plan_chunks(0, num_steps, np.arange(num_steps + 1), NO_CUTS, record_size, 1024)
        return len(chunks[0].steps_between)

    assert room(1) == 1024
    assert room(10**5) == 32  # 2^22 / 10^5 = 41.9, and a power of two
    assert room(10**8) == 1


def test_a_cut_begins_a_chunk():
    cuts = np.array([3, 40])
    chunks = plan_chunks(0, 50, np.arange(0, 51, 10), cuts, record_size=1, max_records=256)
    assert [int(c.start) for c in chunks] == [0, 3, 40]
    np.testing.assert_array_equal(records_of(chunks), [0, 3, 10, 20, 30, 40, 50])
    assert not chunks[1].is_saved[0]


@pytest.mark.parametrize("step", range(5, 31, 5))
def test_until_takes_no_step_behind(step):
    (chunk,) = plan_chunks(5, 30, np.array([5, 10, 20, 30]), NO_CUTS, 1, 256)
    part = chunk.until(step)
    assert part.num_records == chunk.num_records
    assert part.end == step
    np.testing.assert_array_equal(records(part), np.minimum(records(chunk), step))
    positive = part.steps_between > 0
    assert not np.any(np.diff(positive.astype(int)) > 0)  # zeros are the last ones


def test_a_single_step_between_records_is_told():
    (chunk,) = plan_chunks(0, 9, np.arange(10), NO_CUTS, 1, 256)
    assert chunk.single_steps
    (chunk,) = plan_chunks(0, 9, np.arange(0, 10, 3), NO_CUTS, 1, 256)
    assert not chunk.single_steps


def test_traced_runs_have_one_chunk_of_just_their_records():
    chunk = plan_one_chunk(4, 2000, np.array([7, 1999]))
    np.testing.assert_array_equal(chunk.steps, [4, 7, 1999, 2000])
    np.testing.assert_array_equal(chunk.is_saved, [False, True, True, False])
    assert chunk.num_records == 4
    assert chunk.count == 1996

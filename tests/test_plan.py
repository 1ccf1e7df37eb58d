"""Which rows a run has and in which stretches it is computed: NumPy only, no run is made."""

import itertools

import numpy as np
import pytest

from eomdl.runs.plan import MAX_STEPS, plan, plan_at_once, saved_steps


NO_CUTS = np.array([], int)


def rows_of(planned):
    return np.concatenate([s.rows for s in planned.stretches])


@pytest.mark.parametrize("save", [1, 7, 100, 3000, [5], [0, 2999], [17, 1500, 1501]])
@pytest.mark.parametrize("start", [0, 13, 3000])
def test_stretches_cover_the_run_without_a_gap(start, save):
    saved = saved_steps("save_steps", 3000, save)
    planned = plan(start, 3000, saved, NO_CUTS, row_size=10, max_rows=256)
    assert planned.stretches[0].start == start
    assert planned.stretches[-1].end == 3000
    for before, after in itertools.pairwise(planned.stretches):
        assert before.end == after.start
    rows = rows_of(planned)
    assert np.all(np.diff(rows) > 0)
    kept = np.concatenate([s.rows[s.saved] for s in planned.stretches])
    np.testing.assert_array_equal(kept, saved[saved >= start])


@pytest.mark.parametrize("save", [1, 7, 3000])
def test_stretches_stay_within_their_room(save):
    saved = saved_steps("save_steps", 3000, save)
    planned = plan(0, 3000, saved, NO_CUTS, row_size=10, max_rows=256)
    for stretch in planned.stretches:
        assert len(stretch.rows) <= planned.num_rows == 256
        assert stretch.count <= MAX_STEPS
        assert stretch.count <= planned.num_steps
        assert len(stretch.padded_gaps(256)) == 256


@pytest.mark.parametrize("num_steps", [1, 20, 33, 300, 5000])
def test_the_room_for_rows_does_not_depend_on_the_length(num_steps):
    def room(row_size):
        return plan(0, num_steps, np.arange(num_steps + 1), NO_CUTS, row_size, 1024).num_rows

    assert room(1) == 1024
    assert room(10**5) == 32  # 2^22 / 10^5 = 41.9, and a power of two
    assert room(10**8) == 1


def test_a_cut_begins_a_stretch():
    cuts = np.array([3, 40])
    planned = plan(0, 50, np.arange(0, 51, 10), cuts, row_size=1, max_rows=256)
    assert [s.start for s in planned.stretches] == [0, 3, 40]
    np.testing.assert_array_equal(rows_of(planned), [0, 3, 10, 20, 30, 40, 50])
    assert not planned.stretches[1].saved[0]


@pytest.mark.parametrize("step", range(5, 31, 5))
def test_until_takes_no_step_behind(step):
    (stretch,) = plan(5, 30, np.array([5, 10, 20, 30]), NO_CUTS, 1, 256).stretches
    part = stretch.until(step)
    np.testing.assert_array_equal(part.rows, stretch.rows)
    assert part.end == step
    positive = part.gaps > 0
    assert not np.any(np.diff(positive.astype(int)) > 0)  # gaps of 0 are the last ones


def test_a_single_step_between_rows_is_told():
    assert plan(0, 9, np.arange(10), NO_CUTS, 1, 256).single
    assert not plan(0, 9, np.arange(0, 10, 3), NO_CUTS, 1, 256).single


def test_traced_runs_have_one_stretch_of_just_their_rows():
    planned = plan_at_once(4, 2000, np.array([7, 1999]))
    (stretch,) = planned.stretches
    np.testing.assert_array_equal(stretch.rows, [4, 7, 1999, 2000])
    np.testing.assert_array_equal(stretch.saved, [False, True, True, False])
    assert planned.num_rows == 4
    assert stretch.count == 1996

"""`compare`: distances as by hand, and the orders that the theory promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from helpers import (
    NET,
    NET_ARGS,
    NET_BATCHES,
    VALLEY,
    assert_identical,
    flat,
    net_loss,
    quadratic_loss,
    valley_loss,
)
from registry import up_to

import eomdl
from eomdl._result import format_number


SGD = optax.sgd(0.1)
OBSERVE = {
    "loss": lambda p, args: net_loss(p, NET_ARGS),
    "bias": lambda p, args: p["layer1"]["b"],
}


@pytest.fixture(scope="module")
def runs():
    real = eomdl.descend(net_loss, NET, SGD, 12, args=NET_ARGS, observe=OBSERVE)
    models = {
        flow.name: eomdl.solve(flow.make(net_loss, 0.1), NET, 12, args=NET_ARGS, observe=OBSERVE)
        for flow in up_to(2)
    }
    return real, models


@pytest.fixture(scope="module")
def comparison(runs):
    return eomdl.compare(*runs)


def test_distances_by_hand(runs, comparison):
    real, models = runs
    assert comparison.models == ("gradient flow", "EoM 1", "EoM 2")
    np.testing.assert_array_equal(comparison.steps, np.arange(13))
    np.testing.assert_allclose(comparison.times, 0.1 * np.arange(13))
    for k in range(13):
        travelled = np.linalg.norm(flat(real.at(k)) - flat(NET))
        np.testing.assert_allclose(comparison.travelled[k], travelled, rtol=1e-12)
        for name, model in models.items():
            distance = np.linalg.norm(flat(model.at(k)) - flat(real.at(k)))
            np.testing.assert_allclose(comparison.distance[name][k], distance, rtol=1e-12)
            if k > 0:
                np.testing.assert_allclose(
                    comparison.relative_distance[name][k], distance / travelled, rtol=1e-12
                )
            blocks = comparison.block_distance[name]
            assert set(blocks) == {"layer0", "layer1"}
            for block, d in blocks.items():
                by_hand = np.linalg.norm(flat(model.at(k)[block]) - flat(real.at(k)[block]))
                np.testing.assert_allclose(d[k], by_hand, rtol=1e-12)
    assert np.isnan(comparison.relative_distance["EoM 1"][0])


def test_differences_of_observables(runs, comparison):
    real, models = runs
    for name, model in models.items():
        for key, shape in (("loss", (13,)), ("bias", (13, 2))):
            difference = comparison.differences[name][key]
            assert difference.shape == shape
            assert_identical(difference, model.observables[key] - real.observables[key])
        assert_identical(comparison.ode_error[name], model.ode_error)


def test_more_counter_terms_are_closer(comparison):
    last = [comparison.distance[name][-1] for name in comparison.models]
    assert last[0] > 5 * last[1] > 25 * last[2]


def test_only_common_steps_are_compared(runs):
    real, models = runs
    sparse = eomdl.descend(net_loss, NET, SGD, 12, args=NET_ARGS, save_steps=[3, 6, 11])
    comparison = eomdl.compare(sparse, models)
    np.testing.assert_array_equal(comparison.steps, [3, 6, 11])
    whole = eomdl.compare(real, models)
    np.testing.assert_array_equal(comparison.distance["EoM 1"], whole.distance["EoM 1"][[3, 6, 11]])


def test_distance_travelled_is_from_the_start_of_the_run():
    late = eomdl.descend(valley_loss, VALLEY, SGD, 20, save_steps=[0, 10, 20])
    model = eomdl.solve(eomdl.GradientFlow(valley_loss, 0.1), VALLEY, 20, save_steps=[10, 20])
    comparison = eomdl.compare(late, {"gf": model})
    np.testing.assert_allclose(
        comparison.travelled,
        [np.linalg.norm(flat(late.at(k)) - flat(VALLEY)) for k in (10, 20)],
        rtol=1e-13,
    )


def test_runs_with_observables_alone():
    observe = {"loss": valley_loss}
    real = eomdl.descend(valley_loss, VALLEY, SGD, 9, observe=observe, save_params=False)
    model = eomdl.solve(eomdl.GradientFlow(valley_loss, 0.1), VALLEY, 9, observe=observe, save_params=False)
    comparison = eomdl.compare(real, {"gf": model})
    assert comparison.distance == {}
    assert np.isnan(comparison.travelled).all()  # nobody knows
    expected = model.observables["loss"] - real.observables["loss"]
    np.testing.assert_array_equal(comparison.differences["gf"]["loss"], expected)
    assert format_number(np.abs(expected).max()) in comparison.table()
    (panel,) = comparison.plot().axes  # no distances, no panel of distances
    (line,) = panel.get_lines()
    np.testing.assert_array_equal(line.get_ydata()[1:], np.abs(expected)[1:])


def test_a_model_without_parameters_beside_one_with_them(runs):
    real, models = runs
    observe = {"loss": OBSERVE["loss"]}
    bare = eomdl.descend(
        net_loss, NET, SGD, 12, args=NET_ARGS, observe=observe, save_params=False, save_steps=[12]
    )
    comparison = eomdl.compare(real, {"flow": models["gradient flow"], "bare": bare})
    assert list(comparison.distance) == ["flow"]
    np.testing.assert_array_equal(comparison.steps, [12])
    (row,) = [line for line in comparison.table().splitlines() if " bare " in line]
    # No distance at step 12, largest, over travelled; no ODE error, no bias; its loss is that of the real run.
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["bare", "-", "-", "-", "-", "-", "0"]
    frame = comparison.to_frame().set_index("model")
    assert frame.loc["flow", "distance"] == comparison.distance["flow"][0]
    assert np.isnan(frame.loc["bare", "distance"])
    assert np.isnan(frame.loc["bare", "ode_error"])
    assert frame.loc["bare", "difference loss"] == 0
    drawn = [axes.get_legend_handles_labels()[1] for axes in comparison.plot().axes]
    assert drawn == [["flow", "ODE error (estimate)"], ["flow", "bare"]]


def test_nothing_to_plot_is_said():
    observe = {"both": lambda p, args: jnp.stack([p["x"], p["y"]])}
    run = eomdl.descend(valley_loss, VALLEY, SGD, 3, observe=observe, save_params=False)
    with pytest.raises(ValueError, match=r"^comparison: expected saved params or scalar observables"):
        eomdl.compare(run, {"itself": run}).plot()


def test_a_failed_run_is_noted():
    real = eomdl.descend(lambda y, args: y**4 / 4, jnp.array(4.0), optax.sgd(0.2), 40)
    comparison = eomdl.compare(real, {"itself": real})
    assert [note.split(":")[0] for note in comparison.notes] == ["reference", "itself", "itself"]
    assert comparison.notes[2].startswith("itself: 2 / sharpness at the start: 0.0416667.")  # 2 / (3 * 4**2)
    assert all("Use a smaller learning rate" in note for note in comparison.notes[:2])
    assert comparison.notes[0] in comparison.table()


# ------------------------------------------------------- for people and for files


def test_table(comparison):
    lines = comparison.table().splitlines()
    for name in comparison.models:
        (line,) = [line for line in lines if f" {name} " in line]
        for number in (
            comparison.distance[name][-1],
            comparison.distance[name].max(),
            comparison.ode_error[name].max(),
            np.abs(comparison.differences[name]["loss"]).max(),
            np.abs(comparison.differences[name]["bias"]).max(),
        ):
            assert format_number(number) in line


def test_frame(comparison):
    frame = comparison.to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert len(frame) == 3 * 13
    one = frame[(frame.model == "EoM 1") & (frame.step == 7)].iloc[0]
    assert one["distance"] == comparison.distance["EoM 1"][7]
    assert one["relative_distance"] == comparison.relative_distance["EoM 1"][7]
    assert one["distance layer0"] == comparison.block_distance["EoM 1"]["layer0"][7]
    assert one["ode_error"] == comparison.ode_error["EoM 1"][7]
    assert one["difference loss"] == comparison.differences["EoM 1"]["loss"][7]
    bias = np.linalg.norm(comparison.differences["EoM 1"]["bias"][7])
    np.testing.assert_allclose(one["difference bias (norm)"], bias, rtol=1e-14)


def test_plot(comparison, tmp_path):
    figure = comparison.plot()
    distance, loss = figure.axes
    assert distance.get_yscale() == loss.get_yscale() == "log"
    lines = {line.get_label(): line for line in distance.get_lines()}
    for name in comparison.models:
        y = lines[name].get_ydata()
        np.testing.assert_array_equal(y[1:], comparison.distance[name][1:])
        (dotted,) = (
            x
            for x in distance.get_lines()
            if x.get_color() == lines[name].get_color() and x.get_linestyle() == ":"
        )
        np.testing.assert_array_equal(dotted.get_ydata()[1:], comparison.ode_error[name][1:])
    for line in loss.get_lines():
        difference = comparison.differences[line.get_label()]["loss"]
        np.testing.assert_array_equal(line.get_ydata()[1:], np.abs(difference)[1:])
    assert len(loss.get_lines()) == 3
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_save_and_load(comparison, tmp_path):
    comparison.save(tmp_path / "comparison.npz")
    loaded = eomdl.Comparison.load(tmp_path / "comparison.npz")
    for field in ("steps", "times", "travelled", "distance", "block_distance", "ode_error", "differences"):
        assert_identical(getattr(loaded, field), getattr(comparison, field))
    assert loaded.notes == comparison.notes
    assert loaded.models == comparison.models
    assert loaded.table() == comparison.table()
    np.load(tmp_path / "comparison.npz", allow_pickle=False)
    data = (tmp_path / "comparison.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(data[:-30])
    with pytest.raises(ValueError, match=r"path: expected a whole file .*short\.npz"):
        eomdl.Comparison.load(tmp_path / "short.npz")


def test_notes_survive_saving(tmp_path):
    real = eomdl.descend(lambda y, args: y**4 / 4, jnp.array(4.0), optax.sgd(0.2), 40)
    comparison = eomdl.compare(real, {"itself": real})
    comparison.save(tmp_path / "c.npz")
    loaded = eomdl.Comparison.load(tmp_path / "c.npz")
    assert loaded.notes == comparison.notes != ()
    assert [note.is_fault for note in loaded.notes] == [True, True, False]


# -------------------------------------------------------------------- validity


def test_warns_where_the_series_has_no_limit():
    params, args = jnp.ones(2), (jnp.diag(jnp.array([4.0, 1.0])), jnp.zeros(2))
    for product, expected in ((1.2, True), (0.9, False)):
        eta = product / 4
        real = eomdl.descend(quadratic_loss, params, optax.sgd(eta), 5, args=args)
        models = {
            flow.name: eomdl.solve(flow.make(quadratic_loss, eta), params, 5, args=args) for flow in up_to(1)
        }
        if expected:
            with pytest.warns(
                UserWarning, match=r"^EoM 1: eta\*lambda_max reached 1\.20 .*lower the learning"
            ):
                comparison = eomdl.compare(real, models)
            assert len(comparison.notes) == 1  # gradient flow is no series
            assert comparison.notes[0] in comparison.table()
        else:
            assert eomdl.compare(real, models).notes == ()


# --------------------------------------------------------- one rate, one run


def another(params, args):
    return 1.5 * net_loss(params, args)


MODELLED = {"args": NET_ARGS}
OTHER_RUNS = {
    "another rate": (net_loss, NET, optax.sgd(0.11), MODELLED),
    "another loss": (another, NET, SGD, MODELLED),
    "other data": (net_loss, NET, SGD, {"args": (NET_ARGS[0][:3], NET_ARGS[1][:3])}),
    "other batches": (net_loss, NET, SGD, {"batches": NET_BATCHES}),
    "momentum": (net_loss, NET, optax.sgd(0.2, momentum=0.9), MODELLED),
    "another start": (net_loss, jax.tree.map(lambda x: 1.1 * x, NET), SGD, MODELLED),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_model_of_another_run_is_said_to_be_one(runs, name):
    loss, params, optimizer, options = OTHER_RUNS[name]
    other = eomdl.descend(loss, params, optimizer, 12, **options)
    notes = eomdl.compare(other, {"EoM 1": runs[1]["EoM 1"]}).notes
    assert [note for note in notes if note.startswith("EoM 1: it is of another run: from step 0")]


def test_a_model_of_this_run_is_not(runs):
    real, models = runs
    assert eomdl.compare(real, models).notes == ()
    # Nor where it cannot be known: the reference did not save its first step.
    few = eomdl.descend(another, NET, SGD, 12, args=NET_ARGS, save_steps=[0, 6, 12])
    assert eomdl.compare(few, {"EoM 1": models["EoM 1"]}).notes == ()
    # Nor of a flow that begins at the end of a real run.
    half = eomdl.descend(net_loss, NET, SGD, 6, args=NET_ARGS)
    later = eomdl.solve(eomdl.EquationOfMotion(net_loss, 0.1, 1), NET, 12, args=NET_ARGS, resume=half)
    assert later.stats.first_step == 6
    assert eomdl.compare(real, {"EoM 1": later}).notes == ()


def test_runs_of_two_lengths_are_said_to_be(runs):
    _, models = runs
    short = eomdl.descend(net_loss, NET, SGD, 8, args=NET_ARGS)
    (note,) = eomdl.compare(short, {"EoM 1": models["EoM 1"]}).notes
    assert note == "EoM 1: it has 12 steps and the reference 8; the steps that both have are compared."
    assert not note.is_fault


def test_a_run_that_diverged_is_compared_without_warnings():
    def steep(params, args):
        return jnp.sum(params**4)

    start = jnp.full(3, 10.0)
    real = eomdl.descend(steep, start, optax.sgd(1e-2), 40)
    assert real.result == eomdl.RESULTS.nonfinite
    gentle = eomdl.descend(steep, start, optax.sgd(1e-5), 40)
    comparison = eomdl.compare(real, {"another": gentle})  # warnings are errors here
    assert np.isinf(comparison.travelled[-1])
    assert comparison.table()
    assert np.isnan(comparison.relative_distance["another"][0])
    eomdl.geometry.path_shape(real).table()
    real.smoothed(2)
    real.table()


# ---------------------------------------------------------------------- orders


def test_convergence_at_a_fixed_time():
    result = eomdl.errors.convergence_study(
        lambda eta: eomdl.EquationOfMotion(valley_loss, eta, 2),
        valley_loss,
        VALLEY,
        [0.1, 0.05, 0.025],
        time=0.6,
    )
    np.testing.assert_array_equal(result.num_steps, [6, 12, 24])
    assert result.order == pytest.approx(3, abs=0.1)
    assert np.all(result.ode_errors < 0.1 * result.errors)


def test_convergence_without_a_time_is_the_first_step():
    def flow(eta):
        return eomdl.EquationOfMotion(valley_loss, eta, 1)

    result = eomdl.errors.convergence_study(flow, valley_loss, VALLEY, [0.1, 0.05])
    np.testing.assert_array_equal(result.num_steps, [1, 1])
    for eta, error in zip((0.1, 0.05), result.errors, strict=True):
        real = eomdl.descend(valley_loss, VALLEY, optax.sgd(eta), 1)
        np.testing.assert_allclose(eomdl.errors.local_error(flow(eta), real)[1], [error], rtol=1e-2)


def test_convergence_sees_an_optimizer_that_the_flow_does_not_model():
    # Gradient flow at twice the speed: the error does not vanish with the learning rate.
    result = eomdl.errors.convergence_study(
        lambda eta: eomdl.GradientFlow(valley_loss, eta),
        valley_loss,
        VALLEY,
        [0.1, 0.05],
        time=0.6,
        optimizer=lambda eta: optax.sgd(2 * eta),
    )
    assert abs(result.order) < 0.2


def test_observed_order():
    rates = np.array([0.1, 0.05, 0.02])
    assert eomdl.errors.observed_order(rates, 3 * rates**2.5) == pytest.approx(2.5, abs=1e-12)


def test_defect_by_hand():
    # Exact flow of the quadratic over one step against the exact step, on a path of minibatches.
    flow = eomdl.GradientFlow(net_loss, 0.1)
    real = eomdl.descend(net_loss, NET, SGD, 12, batches=NET_BATCHES)
    steps, defects = eomdl.errors.local_error(flow, real, batches=NET_BATCHES, steps=[0, 7])
    for k, defect in zip(steps, defects, strict=True):
        batch = jax.tree.map(lambda leaf, k=k: leaf[k], NET_BATCHES)
        end = eomdl.solve(flow, real.at(k), 1, args=batch, rtol=1e-12, atol=1e-12).at(1)
        by_hand = np.linalg.norm(flat(end) - flat(real.at(k + 1)))
        np.testing.assert_allclose(defect, by_hand, rtol=0.01)


def test_defect_spreads_over_the_path():
    real = eomdl.descend(valley_loss, VALLEY, SGD, 100)
    steps, defects = eomdl.errors.local_error(eomdl.GradientFlow(valley_loss, 0.1), real)
    assert len(steps) == len(defects) == 16
    assert (steps[0], steps[-1]) == (0, 99)
    assert np.all(defects > 0)


def test_local_error_of_a_flow_that_carries_the_optimizer_state():
    optimizer = optax.sgd(0.05, momentum=0.6)
    step = eomdl.optimizer_step(valley_loss, optimizer)
    flow = eomdl.InterpolatingFlow(step, 0.05, 3)
    real = eomdl.descend(valley_loss, VALLEY, optimizer, 9)
    steps, errors = eomdl.errors.local_error(flow, real, steps=[4, 7])
    np.testing.assert_array_equal(steps, [4, 7])
    for k, error in zip(steps.tolist(), errors, strict=True):
        start = eomdl.iterate(step, VALLEY, k)
        path = eomdl.solve(flow, VALLEY, k + 1, resume=start, save_steps=[k + 1], estimate_error=False)
        by_hand = np.linalg.norm(flat(path.final_params) - flat(real.at(k + 1)))
        np.testing.assert_allclose(error, by_hand, rtol=1e-6)
    # The state is that of the map from step 0 on.
    late = eomdl.descend(valley_loss, VALLEY, optimizer, 9, save_steps=[3, 4])
    with pytest.raises(ValueError, match=r"^reference: expected step 0 to be saved, .*InterpolatingFlow"):
        eomdl.errors.local_error(flow, late)

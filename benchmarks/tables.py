"""The tables of the benchmarks: what each one shows, and how a number is written."""

from typing import Any


# What to print of every table: (title, columns as {key: heading}).
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "bar": (
        "Figures to reach",
        {"bar": "bar", "measured": "measured", "relation": "", "limit": "limit", "passed": "passed"},
    ),
    "field": (
        "One evaluation of the field against one gradient",
        {
            "route": "route",
            "order": "order",
            "gradients": "flops / gradient",
            "time_ratio": "seconds / gradient",
            "trace_s": "trace [s]",
            "compile_s": "compile [s]",
        },
    ),
    "solve": (
        "solve on 200 steps of gradient descent (gradients: per GD step)",
        {
            "problem": "problem",
            "order": "order",
            "distance_to_GD": "distance to GD",
            "ode_error": "ODE error",
            "ode_error_estimate": "its estimate",
            "ode_over_model_error": "ODE / model error",
            "ode_steps": "ODE steps",
            "gradients_per_step": "gradients",
            "gradients_per_step_with_estimate": "with estimate_error",
        },
    ),
    "points": (
        "The flow of the step map on 200 steps of gradient descent, eta = 0.1",
        {
            "init": "initialization",
            "eta_lambda_max": "eta lambda_max",
            "weights": "weights",
            "points": "points",
            "distance": "distance to GD",
            "limit": "bar",
            "passed": "passed",
        },
    ),
    "choice": (
        "choose_flow on 200 steps of gradient descent, eta = 0.1: the chosen flow, and the cheapest of all that are near enough",
        {
            "init": "initialization",
            "tolerance": "distance asked for",
            "flow": "flow and solver",
            "chosen": "chosen",
            "predicted_error": "distance predicted",
            "measured_error": "measured",
            "predicted_cost": "gradients per step predicted",
            "measured_cost": "measured",
            "times_the_best": "over the cheapest",
            "candidates_run": "candidates run",
            "cost_of_the_choice": "gradients for the choice",
        },
    ),
    "edge flows": (
        "Flows through the edge against what each predicts of gradient descent: MLP, squared error, 1,000 steps",
        {
            "flow": "flow",
            "at_200": "distance / travelled at step 200",
            "at_400": "400",
            "at_1000": "1000",
            "mean": "mean",
            "mean_of_total": "mean distance / travelled in all",
            "limit": "its bar",
            "loss_difference": "mean loss difference",
            "times_the_run": "time / that of the GD run",
            "times_the_steps": "time / that of bare GD steps",
            "time_limit": "its bar",
            "warnings": "warnings",
        },
    ),
    "edge": (
        "Past the edge: distance to GD over distance travelled, stride 2 (0 points: gradient flow)",
        {
            "network": "network",
            "points": "points",
            "eta_sharpness": "largest eta * sharpness",
            "at_200": "step 200",
            "at_400": "step 400",
            "at_1000": "step 1000",
            "gradients_per_step": "gradients per GD step",
            "chosen": "chosen",
        },
    ),
    "optimizer": (
        "Other optimizers, 50 steps after the transient (0 points: the flow without correction)",
        {
            "optimizer": "optimizer",
            "points": "points",
            "distance": "distance",
            "ode_error": "ODE error",
            "times_nearer": "times nearer",
            "observed_order": "order of the local error",
        },
    ),
    "script": (
        "Fixed-step scripts against solve at the script's ODE error (gradients: per GD step)",
        {
            "script": "script",
            "order": "flow order",
            "distance_to_GD": "distance to GD",
            "ode_error": "ODE error",
            "gradients_per_step": "gradients",
            "solve_ode_error": "solve: ODE error",
            "solve_gradients_per_step": "solve: gradients",
            "times_fewer_gradients": "times fewer",
            "Bosh3_times_fewer_gradients": "with solver=Bosh3()",
        },
    ),
    "euler": (
        "Euler refined to the default ODE error of solve (the extrapolated rows are not measured)",
        {
            "order": "flow order",
            "substeps": "substeps a GD step",
            "ode_error": "ODE error",
            "gradients_per_step": "gradients per GD step",
            "extrapolated": "extrapolated",
            "measured_order": "measured order",
            "times_fewer_gradients": "solve: times fewer",
        },
    ),
    "solver": (
        "Solvers, small problem (gradients: per GD step)",
        {
            "order": "order",
            "solver": "solver",
            "atol_over_default": "atol / default",
            "ode_over_model_error": "ODE / model error",
            "gradients_per_step": "gradients",
        },
    ),
    "growth": (
        "Growth with parameters, data and steps (order 1; seconds without compiling)",
        {
            "num_params": "parameters",
            "num_examples": "examples",
            "num_steps": "GD steps",
            "eta_lambda_max": "eta lambda_max",
            "ode_steps_per_step": "ODE steps per GD step",
            "solve_over_descend_seconds": "solve / descend seconds",
            "field_order_2_gradients": "order-2 field / gradient",
        },
    ),
    "observing": (
        "What observing adds to a run of gradient descent",
        {
            "observed": "observed",
            "every": "every ... steps",
            "gradients": "flops / gradient, once",
            "steps_once": "seconds / those of a GD step, once",
            "compile_s": "compile [s]",
            "run_seconds_ratio": "run / run without it (seconds)",
        },
    ),
    "first answer": (
        "The first path of a process (MLP, 20 steps): seconds with all compiling",
        {
            "order": "order",
            "what": "what",
            "first_s": "seconds",
            "compile_s": "of it XLA [s]",
            "programs": "programs",
            "ratio": "against the call by hand",
        },
    ),
    "leaves": (
        "The first path of a process against the arrays that the parameters are made of (order 1)",
        {
            "what": "what",
            "leaves": "arrays",
            "first_s": "seconds",
            "programs": "programs",
            "growth": "growth",
            "growth_over_leaves": "growth / growth of the arrays",
        },
    ),
    "descending": (
        "descend against a training loop by hand that saves nothing",
        {
            "problem": "problem",
            "num_steps": "steps",
            "ms_by_hand": "by hand [ms]",
            "every_step_ratio": "every step saved, ratio",
            "last_step_ratio": "only the last, ratio",
        },
    ),
    "memory": (
        "Memory of one run of solve (order 1, observables at every step)",
        {
            "num_steps": "GD steps",
            "save_params": "save_params",
            "num_params": "parameters",
            "peak_live_arrays_MiB": "peak JAX arrays [MiB]",
            "peak_rss_growth_MiB": "growth of peak RSS [MiB]",
            "peak_rss_MiB": "peak RSS [MiB]",
            "ode_steps_per_step": "ODE steps per GD step",
        },
    ),
    "chunk memory": (
        "Temporary memory of one evaluation against the number of examples (MLP, float32)",
        {
            "network": "network",
            "derivative": "derivative",
            "num_examples": "examples",
            "plain_MiB": "plain mean [MiB]",
            "chunked_MiB": "MeanOverChunks [MiB]",
            "uneven_MiB": "the same, a last chunk not full [MiB]",
        },
    ),
    "chunk time": (
        "Time and flops of one evaluation over chunks, against the plain mean of the same data in memory",
        {
            "derivative": "derivative",
            "num_examples": "examples",
            "chunk_size": "chunk",
            "flops_ratio": "MeanOverChunks: flops",
            "time_ratio": "MeanOverChunks: seconds",
            "host_time_ratio": "the same from a file: seconds",
        },
    ),
    "chunk runs": (
        "Runs on the full batch, each in a process of its own (MLP, float32)",
        {
            "what": "run",
            "mean": "loss",
            "place": "data",
            "images": "images",
            "num_examples": "examples",
            "num_steps": "GD steps",
            "eta_lambda_max": "eta lambda_max",
            "peak_rss_MiB": "peak resident memory [MiB]",
            "seconds_per_step": "seconds per GD step, compiling in it",
        },
    ),
    "large cost": (
        "Where the gradients of one solve go (order 1, eta lambda 0.3, MLP, float32, error estimated): per step of gradient descent",
        {
            "num_params": "parameters",
            "num_steps": "GD steps",
            "ode_steps": "ODE steps",
            "part": "part",
            "gradients_per_step": "gradients per GD step",
            "share": "share",
        },
    ),
    "large runs": (
        "Ten million parameters: a few steps at eta lambda 0.3, float32, without an error estimate",
        {
            "network": "network",
            "num_params": "parameters",
            "what": "run",
            "solver": "solver",
            "num_steps": "GD steps",
            "ode_steps": "ODE steps",
            "steps_per_step": "time per step / step of a hand-written scan",
            "sharpness_steps": "a measurement of the sharpness / such a step",
            "copies": "largest program / parameters",
            "rss_copies": "growth of resident memory / parameters",
        },
    ),
}


def cell(value: Any) -> str:
    """A value as it is written in a table: three digits."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}"

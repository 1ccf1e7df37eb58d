"""`python -m eomdl FILE`: files as a user would write them, wrong ones, and the page in a real browser."""

import subprocess
import sys
import textwrap

import pytest
from browsing import WIDTHS, looked_at

from eomdl.__main__ import main
from eomdl.reports.problem import WrongFile, read_problem


BARE = """
    import jax.numpy as jnp

    params = {"x": jnp.array(1.2), "y": jnp.array(-0.7)}

    def loss(params, args):
        return 0.5 * (params["y"] - jnp.sin(params["x"])) ** 2 + 0.1 * params["x"] ** 2
"""
FLAX = """
    import flax.linen as nn
    import jax, jax.numpy as jnp, optax

    model = nn.Sequential([nn.Dense(3), nn.tanh, nn.Dense(2)])
    x = jnp.sin(jnp.arange(12.0)).reshape(6, 2)
    args = {"x": x, "labels": jnp.array([0, 1, 0, 1, 1, 0])}
    params = model.init(jax.random.key(0), x)
    optimizer = lambda rate: optax.sgd(rate, momentum=0.5)

    def loss(params, args):
        logits = model.apply(params, args["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, args["labels"]).mean()
"""
ADAM = """
    import jax.numpy as jnp, numpy as np, optax

    x = np.linspace(-1, 1, 8)
    args = (jnp.asarray(x), jnp.sin(jnp.asarray(x)))
    optimizer = optax.adam
    wide = {"params": jnp.array([0.5, 0.1, 0.2])}

    def loss(w, data):
        x, y = data
        return jnp.mean((w[0] * x + w[1] + w[2] * jnp.tanh(x) - y) ** 2)

    def batches(steps):
        rng = np.random.default_rng(0)
        for _ in range(steps):
            rows = rng.integers(0, 8, 4)
            yield args[0][rows], args[1][rows]

    print("read")
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into a folder of its own, which is where the command runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def written(text: str, name: str = "user.py") -> str:
        (tmp_path / name).write_text(textwrap.dedent(text))
        return name

    return written


def run(*arguments: str) -> int:
    return main([*arguments, "--learning-rate", "0.05", "--steps", "8", "--quick"])


# ------------------------------------------------- three files


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page on a bare JAX loss, and what the command said."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "bare.py").write_text(textwrap.dedent(BARE))
    out = folder / "page.html"
    assert run(str(folder / "bare.py"), "--out", str(out)) == 0
    return out


def test_a_bare_loss(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<section") == 7
    assert "Not answered" not in text
    assert "plain gradient descent" in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_the_page_in_a_browser(page, browser, device, scheme):
    looked_at(browser, page, device, scheme)


def test_a_flax_model_with_momentum(write, capsys):
    assert run(write(FLAX)) == 0
    said, progress = capsys.readouterr()
    assert said.endswith("All of it: report.html\n")
    assert len(progress.splitlines()) == 7  # a line for each question
    with open("report.html", encoding="utf-8") as file:
        text = file.read()
    assert "momentum 0.5" in text
    assert "params.layers_2" in text  # layers are blocks, not the one root of flax


def test_minibatches_and_adam_by_name(write, capsys):
    assert run(f"{write(ADAM)}:wide", "--out", "page.html") == 0
    said, progress = capsys.readouterr()
    assert "Not answered, with the reason in its section" in said
    assert progress.startswith("FILE printed while it was imported: read\n")


def test_what_a_name_does_not_have_is_taken_from_the_file(write):
    text = BARE + "\n    def small():\n        return {'params': 1.0, 'batches': lambda n: [n] * n}\n"
    text += "\n    class Own:\n        loss = lambda p, a: p['x'] ** 2\n"
    name = write(text)
    problem = read_problem(f"{name}:Own", 3)
    assert problem.loss({"x": 3.0}, None) == 9.0
    assert set(problem.params) == {"x", "y"}
    with pytest.raises(WrongFile, match="raised TypeError"):  # a loss of a dict, on a number
        read_problem(f"{name}:small", 3)


# ------------------------------------------------- wrong ones


WRONG_FILES = {
    "no loss": (BARE.replace("def loss", "def los"), "define `loss`, got no such name; nearest: los"),
    "no params": (BARE.replace("params = ", "param = "), "define `params`, got no such name; nearest: param"),
    "integers": (
        BARE.replace("params = {", "params = 3\n    other = {"),
        "a pytree of real floating-point arrays, got 3",
    ),
    "no function": (BARE + "\n    loss = 3\n", "expected `loss` to be a function"),
    "exit": ("import sys\nsys.exit(4)", "importing it called sys.exit(4)"),
    "syntax": ("def loss(:", "importing it raised SyntaxError"),
    "import": ("import a_module_that_is_not_there", "importing it raised ModuleNotFoundError"),
    "batches": (BARE + "\n    batches = lambda n: 1 / 0\n", "raised ZeroDivisionError"),
    "few batches": (
        BARE + "\n    batches = [1, 2]\n",
        "batches: expected one batch for each of num_steps = 8",
    ),
    "rate": (
        BARE + "\n    import optax\n    optimizer = optax.sgd(0.5)\n",
        "learning_rate: expected 0.5, the optimizer's own, got 0.05",
    ),
    "optimizer": (BARE + "\n    optimizer = 3\n", "optimizer: expected an optax.GradientTransformation"),
    "vector": (
        BARE + "\n    loss = lambda params, args: jnp.ones(2) * params['x']\n",
        "loss: expected a function (params, args) -> real scalar",
    ),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_wrong_files_are_told_in_one_line(write, capsys, kind, tmp_path):
    text, expected = WRONG_FILES[kind]
    name = write(text)
    assert run(name) == 2
    said, error = capsys.readouterr()
    last = error.splitlines()[-1]
    assert said == ""
    assert last.startswith("python -m eomdl: error: ")
    assert expected in last
    assert "eomdl/" not in error.replace(str(tmp_path), "")  # nothing of ours in a traceback
    assert not (tmp_path / "report.html").exists()


def test_a_loss_that_raises_is_shown_in_the_user_s_lines(write, capsys):
    name = write(
        """
        import jax.numpy as jnp
        params, args = jnp.ones(3), jnp.ones((4, 5))

        def predict(w, x):
            return x @ w

        def loss(w, x):
            return predict(w, x).sum()
        """
    )
    assert run(name) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback, in your files only:"
    assert [line.strip().rpartition(" in ")[2] for line in lines if line.startswith("  File")] == [
        "loss",
        "predict",
    ]
    assert "raised TypeError: dot_general" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["user.py:parms"], "got no such name; nearest: params"),
        (["usr.py"], "got no such file: usr.py; nearest: user.py"),
        (["."], "got a folder"),
        (["user.py", "--out", "nowhere/page.html"], "expected a file in a folder that is there"),
        (["user.py", "--out", "."], "expected a file, got the folder"),
        (["user.py", "--learning-rate", "-1"], "--learning-rate: expected a finite number > 0, got -1"),
        (["user.py", "--learning-rate", "nan"], "--learning-rate: expected a finite number > 0, got nan"),
        (["user.py", "--steps", "0"], "--steps: expected an integer >= 1, got 0"),
        (["user.py", "--step", "3"], "unrecognized arguments"),
        ([], "the following arguments are required"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_arguments_are_told_in_one_line(write, capsys, arguments, expected):
    write(BARE)
    defaults = ["--learning-rate", "0.1", "--steps", "5"]
    try:
        code = main([*defaults, *arguments] if arguments else [])
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2
    assert expected in error
    assert len(error.splitlines()) == 1


def test_the_help_says_what_a_file_defines(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("loss(params, args)", "batches", "optimizer", "FILE.py:NAME", "example:")
    )
    assert max(map(len, text.splitlines())) <= 125


def test_without_matplotlib_it_says_what_to_install(write, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(write(BARE)) == 2
    assert capsys.readouterr().err.endswith("the pictures come with pip install 'eomdl[plot]'\n")


def test_ctrl_c_leaves_nothing_behind(write, capsys, monkeypatch, tmp_path):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("eomdl.__main__.report", interrupted)
    assert run(write(BARE)) == 130
    assert "interrupted, nothing written" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_as_a_process(write):
    name = write(BARE.replace("def loss", "def los"))
    command = [sys.executable, "-m", "eomdl", name, "--learning-rate", "0.1", "--steps", "5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr
        == "python -m eomdl: error: user.py: expected it to define `loss`, got no such name; nearest: los\n"
    )

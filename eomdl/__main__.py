"""`python -m eomdl FILE.py[:NAME] --learning-rate 0.1 --steps 500`: what the learning rate does, as a page."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import optax
from typing_extensions import override

from eomdl.reports.problem import Problem, WrongFile, read_problem
from eomdl.reports.written import report


USAGE, INTERRUPTED = 2, 130  # exit codes

DESCRIPTION = """\
What the learning rate does to a training run: one page of HTML, for people who do not know the theory.

It says whether the rate is at the edge of stability and since when, how far the run is from gradient flow (predicted and
measured), up to which rate gradient flow is a fair picture, what finite steps add, which differential equation describes the
run and at what cost, which symmetries the loss has and how their charges drift, and what the path looks like."""

EPILOG = """\
FILE.py is imported (what stands under `if __name__ == "__main__":` is not run). It defines

  loss(params, args)  a JAX function that returns a number
  params              a pytree of floating-point arrays: where training starts
  args                the data that the loss takes (optional)
  optimizer           a function learning_rate -> optax optimizer, such as optax.adam or
                      lambda rate: optax.sgd(rate, momentum=0.9); or an optax optimizer that has
                      the same learning rate (optional; gradient descent)
  batches             one batch for each step: a list, an iterator, arrays with a leading axis of
                      steps, or a function of the number of steps (optional; `args` every step)

With FILE.py:NAME these are taken from the object NAME in the file: keys of a dict, attributes of a class or
namespace, or what a function without arguments returns. What NAME does not have is taken from the file.

Double precision is up to the file: jax.config.update("jax_enable_x64", True).

example:
  python -m eomdl train.py --learning-rate 0.1 --steps 500 --out report.html --quick"""


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        """Exit with one line that says where there is more."""
        self.exit(USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number > 0, got {text}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return int(text)


def _writable(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {path}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that is there, got {path}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {path}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m eomdl",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE.py[:NAME]", help="what is trained: see below")
    parser.add_argument(
        "--learning-rate", type=_positive, required=True, metavar="RATE", help="of the optimizer"
    )
    parser.add_argument("--steps", type=_count, required=True, metavar="N", help="how many steps of training")
    parser.add_argument(
        "--out", type=_writable, default=Path("report.html"), metavar="PAGE", help="default: %(default)s"
    )
    parser.add_argument(
        "--quick", action="store_true", help="measure fewer points, for an answer in a minute"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for a wrong argument or file, 130 at Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        problem = read_problem(options.file, options.steps)
        _mention(problem)
        page = report(
            problem.loss,
            problem.params,
            options.learning_rate,
            options.steps,
            optimizer=optax.sgd if problem.optimizer is None else problem.optimizer,
            args=problem.args,
            batches=problem.batches,
            quick=options.quick,
            progress=True,
        )
        page.save(options.out)
    except WrongFile as error:
        sys.stderr.write(error.details)
        sys.stderr.write(f"{parser.prog}: error: {error}\n")
        return USAGE
    except ModuleNotFoundError as error:
        sys.stderr.write(f"{parser.prog}: error: {error}: the pictures come with pip install 'eomdl[plot]'\n")
        return USAGE
    except (ValueError, OSError) as error:
        one_line = " ".join(str(error).split())
        sys.stderr.write(f"{parser.prog}: error: {one_line}\n")
        return USAGE
    except KeyboardInterrupt:
        sys.stderr.write(f"{parser.prog}: interrupted, nothing written\n")
        return INTERRUPTED
    print("\n".join([*page.summary, f"All of it: {options.out}"]))
    return 0


def _mention(problem: Problem) -> None:
    """Repeat what the file printed, so that it is not taken for ours."""
    lines = problem.printed.splitlines()
    if lines:
        more = f" (and {len(lines) - 3} lines more)" if len(lines) > 3 else ""
        sys.stderr.write("FILE printed while it was imported: " + " / ".join(lines[:3]) + more + "\n")


if __name__ == "__main__":
    sys.exit(main())

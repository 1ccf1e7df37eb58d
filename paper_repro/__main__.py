"""`python -m paper_repro`: run the main reproductions, all of them or those named, and write a report.

A reproduction that is done, with the same options and code, is not run again: an interrupted run continues where it was.
"""

import argparse
import difflib
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from paper_repro import harness, publish, report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m paper_repro", description=__doc__)
    parser.add_argument("names", nargs="*", help="which to run (default: the equation of motion's own)")
    parser.add_argument("--all", action="store_true", help="run every one")
    parser.add_argument("--list", action="store_true", help="only list them")
    parser.add_argument("--fresh", action="store_true", help="run also what is done")
    parser.add_argument("--data", metavar="DIR", help="folder of IDX files (default: scikit-learn's digits)")
    parser.add_argument("--subset", type=int, help="how many images (default: each one's own)")
    parser.add_argument("--seeds", type=int, help="initializations where spread is shown (default: 3)")
    parser.add_argument("--float32", action="store_true", help="single precision; claims are not asserted")
    parser.add_argument("--smoke", action="store_true", help="a small size: seconds each")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder to write to (default: results)"
    )
    parser.add_argument(
        "--readme",
        action="store_true",
        help="write README.md's table and the documentation's page from --out",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run; the exit status is 1 if a claim does not hold, 2 if an argument is wrong, 130 if interrupted."""
    args = _parser().parse_args(argv)
    jax.config.update("jax_enable_x64", not args.float32)
    console, known = Console(), harness.discover()
    wrong = _wrong(args, known)
    if args.list or (wrong is None and not args.readme):
        console.print(_listed(known))
    if wrong is not None or args.list:
        console.print(wrong or "", markup=False)
        return 0 if args.list else 2
    chosen = [r for r in known.values() if r.name in args.names or args.all or (not args.names and r.main)]
    options = harness.Options(args.data, args.subset, args.seeds, args.float32, args.smoke)
    try:
        if args.readme:
            written = publish.write(list(known.values()), args.out)
            console.print(*[f"wrote {path}" for path in written], sep="\n", soft_wrap=True, markup=False)
            return 0
        results = _run(chosen, options, args.out, args.fresh, console)
    except ValueError as error:
        console.print(str(error), markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; what is done is kept, and the same command continues")
        return 130
    failed = [(r.reproduction.name, c.text) for r in results for c in r.failed]
    for name, text in failed:
        console.print(f"claim does not hold: {name}: {text}", markup=False)
    return 1 if failed else 0


def _run(
    chosen: list[harness.Reproduction], options: harness.Options, out: Path, fresh: bool, console: Console
) -> list[harness.Result]:
    """Run what is not done; the report is written after each, so that an interrupted run keeps what it has."""
    results: list[harness.Result] = []
    path = out / "report.html"
    for n, reproduction in enumerate(chosen):
        left = sum(r.seconds for r in chosen[n:]) / 60
        where = "" if options.smoke else f"; about {left:.0f} min left"
        console.rule(f"{reproduction.name} ({n + 1} of {len(chosen)}{where})")
        done = not fresh and harness.is_done(reproduction, options, out)
        try:
            result = harness.read(reproduction, out) if done else harness.run(reproduction, options, out)
        except ValueError as error:
            raise ValueError(f"{reproduction.name}: {error}") from error
        results.append(result)
        _tell(result, done, console)
        path.write_text(report.page(results, harness.environment()))
    console.print(f"report: {path.resolve()}", soft_wrap=True, markup=False)
    return results


def _tell(result: harness.Result, done: bool, console: Console) -> None:
    for claim in result.claims:
        word = {True: "holds", False: "DOES NOT HOLD", None: "not asserted"}[claim.holds]
        console.print(f"  {word}: {claim.text} {claim.measured}", markup=False)
    seconds = result.record["seconds"]
    console.print(f"  {seconds:.0f} s" + (", done before (--fresh runs it again)" if done else ""))


def _wrong(args: argparse.Namespace, known: Mapping[str, object]) -> str | None:
    """What is wrong with the arguments, if anything."""
    for name in args.names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            return f"unknown reproduction {name!r}; did you mean {nearest!r}? (--list shows all)"
    for option in ("seeds", "subset"):
        value = getattr(args, option)
        if value is not None and value < 1:
            return f"--{option}: expected an integer >= 1, got {value}"
    return None


def _listed(reproductions: Mapping[str, harness.Reproduction]) -> Table:
    table = Table(title="Reproductions")
    for column in ("name", "what", "minutes"):
        table.add_column(column)
    for r in reproductions.values():
        table.add_row(r.name, r.title, f"{r.seconds / 60:.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main())

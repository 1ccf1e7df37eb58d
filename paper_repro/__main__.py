"""`python -m paper_repro`: list the reproductions, run the main ones, all of them or those named."""

import argparse
import dataclasses
import difflib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m paper_repro", description=__doc__)
    parser.add_argument("names", nargs="*", help="which to run (default: the equation of motion's own)")
    parser.add_argument("--all", action="store_true", help="run every one")
    parser.add_argument("--list", action="store_true", help="only list them")
    parser.add_argument("--data", metavar="DIR", help="folder of IDX files (default: scikit-learn's digits)")
    parser.add_argument("--subset", type=int, help="how many images (default: each one's own)")
    parser.add_argument(
        "--seeds", type=int, default=3, help="initializations where spread is shown (default: 3)"
    )
    parser.add_argument("--float32", action="store_true", help="single precision; claims are not asserted")
    parser.add_argument("--smoke", action="store_true", help="a small size: seconds each")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder to write to (default: results)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run; the exit status is 1 if a claim does not hold, 2 if an argument is wrong."""
    args = _parser().parse_args(argv)
    jax.config.update("jax_enable_x64", not args.float32)
    from paper_repro.registry import MAIN, REPRODUCTIONS
    from paper_repro.report import page
    from paper_repro.reproduction import Config, environment

    console = Console()
    wrong = _wrong(args, REPRODUCTIONS)
    if wrong is None or args.list:
        console.print(_listed(REPRODUCTIONS))
    if wrong is not None:
        console.print(wrong, markup=False)
        return 2
    if args.list:
        return 0

    config = Config(args.data, args.subset, args.seeds, args.float32, args.smoke)
    results: list[tuple] = []
    for name in REPRODUCTIONS if args.all else args.names or MAIN:
        try:
            results.append(_run(REPRODUCTIONS[name], config, args.out, console))
        except ValueError as error:
            console.print(f"{name}: {error}", markup=False)
            return 2
        # After every one, so that an interrupted run keeps what it has.
        report = args.out / "report.html"
        report.write_text(page(results, environment()))
    console.print(f"report: {report.resolve()}", soft_wrap=True)
    failed = [(r.name, c.text) for r, _, claims, _ in results for c in claims if c.holds is False]
    for name, text in failed:
        console.print(f"claim does not hold: {name}: {text}", markup=False)
    return 1 if failed else 0


def _wrong(args: argparse.Namespace, known: Mapping[str, Any]) -> str | None:
    """What is wrong with the arguments, if anything."""
    for name in args.names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            return f"unknown reproduction {name!r}; did you mean {nearest!r}? (--list shows all)"
    if args.seeds < 1 or (args.subset is not None and args.subset < 1):
        return f"--seeds, --subset: expected integers >= 1, got {args.seeds}, {args.subset}"
    return None


def _listed(reproductions: Mapping[str, Any]) -> Table:
    table = Table(title="Reproductions")
    for column in ("name", "what", "minutes"):
        table.add_column(column)
    for r in reproductions.values():
        table.add_row(r.name, r.title, f"{r.seconds / 60:.1f}")
    return table


def _run(reproduction: Any, config: Any, out: Path, console: Console) -> tuple:
    """One reproduction: its tables, claims and pictures, written and told."""
    from paper_repro.reproduction import write

    console.rule(f"{reproduction.name}: {reproduction.title}")
    start = time.perf_counter()
    tables, claims = reproduction.run(config)
    seconds = time.perf_counter() - start
    # Compiled programs are never dropped by JAX, and thirteen reproductions use up a process's memory maps.
    jax.clear_caches()
    if config.float32:
        claims = [dataclasses.replace(claim, holds=None) for claim in claims]
    figures = write(reproduction, config, tables, claims, seconds, out)
    for claim in claims:
        word = {True: "holds", False: "DOES NOT HOLD", None: "not asserted"}[claim.holds]
        console.print(f"  {word}: {claim.text} {claim.measured}", markup=False)
    console.print(f"  {seconds:.0f} s")
    return reproduction, tables, claims, figures


if __name__ == "__main__":
    sys.exit(main())

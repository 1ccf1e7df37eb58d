"""`python -m paper_repro`: list the reproductions, run the main ones, all of them or those named."""

import argparse
import dataclasses
import difflib
import sys
import time
from pathlib import Path

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
    from paper_repro.reproduction import Config, environment, write

    console = Console()
    for name in args.names:
        if name not in REPRODUCTIONS:
            nearest = difflib.get_close_matches(name, REPRODUCTIONS, n=1, cutoff=0)[0]
            console.print(f"unknown reproduction {name!r}; did you mean {nearest!r}? (--list shows all)")
            return 2
    table = Table(title="Reproductions")
    for column in ("name", "what", "minutes"):
        table.add_column(column)
    for r in REPRODUCTIONS.values():
        table.add_row(r.name, r.title, f"{r.seconds / 60:.1f}")
    console.print(table)
    if args.list:
        return 0
    if args.seeds < 1 or (args.subset is not None and args.subset < 1):
        console.print(f"--seeds, --subset: expected integers >= 1, got {args.seeds}, {args.subset}")
        return 2

    config = Config(args.data, args.subset, args.seeds, args.float32, args.smoke)
    results, failed = [], []
    for name in REPRODUCTIONS if args.all else args.names or MAIN:
        reproduction = REPRODUCTIONS[name]
        console.rule(f"{name}: {reproduction.title}")
        start = time.perf_counter()
        try:
            tables, claims = reproduction.run(config)
        except ValueError as error:
            console.print(f"{name}: {error}", markup=False)
            return 2
        seconds = time.perf_counter() - start
        # Compiled programs are never dropped by JAX, and thirteen reproductions use up a process's memory maps.
        jax.clear_caches()
        if config.float32:
            claims = [dataclasses.replace(claim, holds=None) for claim in claims]
        figures = write(reproduction, config, tables, claims, seconds, args.out)
        results.append((reproduction, tables, claims, figures))
        for claim in claims:
            word = {True: "holds", False: "DOES NOT HOLD", None: "not asserted"}[claim.holds]
            console.print(f"  {word}: {claim.text} {claim.measured}", markup=False)
        failed += [f"{name}: {claim.text}" for claim in claims if claim.holds is False]
        console.print(f"  {seconds:.0f} s")
        # After every one, so that an interrupted run keeps what it has.
        report = args.out / "report.html"
        report.write_text(page(results, environment()))
    console.print(f"report: {report.resolve()}", soft_wrap=True)
    for claim in failed:
        console.print(f"claim does not hold: {claim}", markup=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

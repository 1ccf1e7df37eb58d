"""Runs: discrete and continuous, single and in ensembles, on one clock, in one type."""

from eomdl._end import End
from eomdl.runs.checkpoints import Crossing, logarithmic_steps
from eomdl.runs.data import stacked, stream
from eomdl.runs.ensemble import each, members, stack
from eomdl.runs.monitor import AbstractMonitor
from eomdl.runs.options import RunOptions
from eomdl.runs.rows_on_disk import RowsOnDisk


__all__ = [
    "AbstractMonitor",
    "Crossing",
    "End",
    "RowsOnDisk",
    "RunOptions",
    "each",
    "logarithmic_steps",
    "members",
    "stack",
    "stacked",
    "stream",
]

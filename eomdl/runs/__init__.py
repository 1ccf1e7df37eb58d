"""Runs: discrete and continuous, on one clock, in one type."""

from eomdl._end import RESULTS, End, Stats
from eomdl.runs.checkpoints import Checkpoints, Crossing, logarithmic_steps
from eomdl.runs.continuous import solve
from eomdl.runs.discrete import descend, iterate
from eomdl.runs.options import RunOptions
from eomdl.runs.rows_on_disk import RowsOnDisk
from eomdl.runs.trajectory import Trajectory


__all__ = [
    "RESULTS",
    "Checkpoints",
    "Crossing",
    "End",
    "RowsOnDisk",
    "RunOptions",
    "Stats",
    "Trajectory",
    "descend",
    "iterate",
    "logarithmic_steps",
    "solve",
]

"""Losses made from losses: penalties, means over chunks of data, and the mean of the losses of examples."""

from eomdl.losses.chunks import MeanOverChunks
from eomdl.losses.examples import mean_loss
from eomdl.losses.host import OnHost
from eomdl.losses.penalties import GradientPenalty


__all__ = [
    "GradientPenalty",
    "MeanOverChunks",
    "OnHost",
    "mean_loss",
]

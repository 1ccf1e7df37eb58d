"""Losses made from losses: penalties, and means over chunks of data."""

from eomdl.losses.chunks import MeanOverChunks
from eomdl.losses.host import OnHost
from eomdl.losses.penalties import GradientPenalty


__all__ = [
    "GradientPenalty",
    "MeanOverChunks",
    "OnHost",
]

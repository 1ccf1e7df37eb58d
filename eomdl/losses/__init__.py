"""Losses made from losses: decay, penalties, means over chunks of data."""

from eomdl.losses.chunks import MeanOverChunks
from eomdl.losses.host import OnHost
from eomdl.losses.penalties import GradientPenalty, WeightDecay


__all__ = ["GradientPenalty", "MeanOverChunks", "OnHost", "WeightDecay"]

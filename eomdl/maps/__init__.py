"""The discrete side: step maps, and those of optax optimizers."""

from eomdl.maps.gradient_descent import GradientDescentStep


__all__ = ["GradientDescentStep"]

"""Benchmarks of `eomdl`: costs and accuracies, measured, printed and held to figures."""

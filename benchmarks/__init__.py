"""Benchmarks of `eomdl`: costs and accuracies, measured, printed and compared with limits."""

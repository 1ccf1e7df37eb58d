"""Linear algebra on operators and pytrees: Lanczos, Arnoldi, eigenpairs, complementarity. The room is private to `eomdl`."""

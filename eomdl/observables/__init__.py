"""Functions `(params, args) -> array` to be followed along a path, one theme a file."""

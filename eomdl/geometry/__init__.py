"""The geometry of training paths, one theme a file."""

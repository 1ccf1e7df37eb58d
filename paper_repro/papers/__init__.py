"""The reproductions, one file each; `paper_repro.harness.discover` finds them."""

"""Published results on the learning dynamics of neural networks, measured again.

`python -m paper_repro` runs them; each is a module with one `Reproduction`.
"""

"""Symmetries of a network are found by trying, without being told.

An MLP (24 units) and a CNN (8 channels) with batch norm (gain, shift, no epsilon), ReLU and softmax, on 256 images. A symmetry of the loss
is a direction with which its gradient has cosine zero, and along which its value does not change.
"""

from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

import eomdl
from paper_repro import claims as made, networks, pictures as draw
from paper_repro.harness import Images, Tables


SOURCE = "Kunin et al. 2021, Neural Mechanics (arXiv 2012.04728), the symmetries of section 3."
SECONDS = 15
LIMIT = 1e-10
LOSSES = {"MLP": networks.normalized_mlp_loss, "CNN": networks.normalized_cnn_loss}


class Size(NamedTuple):
    """Images and networks."""

    images: int = 1024
    networks: tuple[str, ...] = tuple(LOSSES)


SMOKE = Size(networks=("MLP",))


def measure(size: Size, images: Images) -> Tables:
    """What `eomdl.symmetry.propose` finds in each network."""
    inputs, labels = images(size.images)
    rows = []
    for network in size.networks:
        start = networks.normalized_start(network, inputs.shape[1])
        for check in eomdl.symmetry.propose(LOSSES[network], start, (inputs[:256], labels[:256])):
            row = {"network": network, "symmetry": check.symmetry.label}
            rows.append(row | {"cosine with the gradient": check.gradient, "change of the loss": check.value})
    return {"symmetries": pd.DataFrame(rows)}


def claims(tables: Tables) -> list[made.Claim]:
    """All four symmetries of each network, and no false one."""
    found = tables["symmetries"]
    largest = found["cosine with the gradient"].max()
    return [
        made.Claim(
            "Told nothing, the numerical test finds the softmax's translations, the scale symmetry of the weights "
            "before batch norm and the rescale symmetry of its gain and shift against the layer after it.",
            f"{len(found)} symmetries, largest cosine with the gradient {largest:.0e}.",
            len(found) == 4 * found["network"].nunique() and bool(largest < LIMIT),
        )
    ]


def pictures(tables: Tables) -> dict[str, Figure]:
    """The cosine of each symmetry's direction with the gradient, against the limit of the claim."""
    found = tables["symmetries"]
    names = found["network"] + ": " + found["symmetry"].str.split(" ").str[0] + " " + found.index.astype(str)
    figure, axes = draw.panel("|cosine with the gradient|", "", xscale="log", xlim=(1e-18, 1e-8))
    axes.plot(found["cosine with the gradient"].abs().clip(lower=1e-18), names, "o", label="found")
    axes.axvline(LIMIT, color="k", ls=":", label="limit of the claim")
    axes.invert_yaxis()
    return {"cosines": draw.add_legend(figure)}

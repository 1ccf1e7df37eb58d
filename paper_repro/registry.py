"""All reproductions, by name."""

from paper_repro import (
    adam,
    development,
    edge_of_stability,
    implicit_regularization,
    momentum,
    nec_discretization,
    nec_scale,
    nec_sgd,
    nec_translation,
    neural_mechanics,
    no_wrong_turns,
    random_reshuffling,
    shape,
)
from paper_repro.reproduction import Reproduction


# The equation of motion itself: what runs when no name is given.
MAIN = ("nec-translation", "nec-scale", "nec-discretization", "nec-sgd")

REPRODUCTIONS: dict[str, Reproduction] = {
    r.name: r
    for r in (
        nec_translation.REPRODUCTION,
        nec_scale.REPRODUCTION,
        nec_discretization.REPRODUCTION,
        nec_sgd.REPRODUCTION,
        implicit_regularization.REPRODUCTION,
        random_reshuffling.REPRODUCTION,
        momentum.REPRODUCTION,
        adam.REPRODUCTION,
        edge_of_stability.REPRODUCTION,
        no_wrong_turns.REPRODUCTION,
        neural_mechanics.REPRODUCTION,
        development.REPRODUCTION,
        shape.REPRODUCTION,
    )
}

"""All reproductions, by name."""

from paper_repro import nec_discretization, nec_scale, nec_sgd, nec_translation
from paper_repro.reproduction import Reproduction


REPRODUCTIONS: dict[str, Reproduction] = {
    r.name: r
    for r in (
        nec_translation.REPRODUCTION,
        nec_scale.REPRODUCTION,
        nec_discretization.REPRODUCTION,
        nec_sgd.REPRODUCTION,
    )
}

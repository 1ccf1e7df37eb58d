"""The papers behind the flows, as BibTeX, and what to cite for a flow."""

import re
from importlib.metadata import version

from eomdl import _check
from eomdl.flows.base import AbstractFlow


# Pages and the like are left out where they could not be looked up: what is here is right.
ENTRIES = {
    "barrett2021": """@inproceedings{barrett2021,
  author    = {Barrett, David G. T. and Dherin, Benoit},
  title     = {Implicit Gradient Regularization},
  booktitle = {International Conference on Learning Representations},
  year      = {2021},
  eprint    = {2009.11162},
  archivePrefix = {arXiv},
}""",
    "cattaneo2024": """@inproceedings{cattaneo2024,
  author    = {Cattaneo, Matias D. and Klusowski, Jason M. and Shigida, Boris},
  title     = {On the Implicit Bias of {Adam}},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  eprint    = {2309.00079},
  archivePrefix = {arXiv},
}""",
    "cohen2025": """@inproceedings{cohen2025,
  author    = {Cohen, Jeremy M. and Damian, Alex and Talwalkar, Ameet and Kolter, J. Zico and Lee, Jason D.},
  title     = {Understanding Optimization in Deep Learning with Central Flows},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  eprint    = {2410.24206},
  archivePrefix = {arXiv},
}""",
    "gelfreich2018": """@article{gelfreich2018,
  author  = {Gelfreich, Vassili and Vieiro, Arturo},
  title   = {Interpolating vector fields for near identity maps and averaging},
  journal = {Nonlinearity},
  volume  = {31},
  year    = {2018},
}""",
    "ghosh2023": """@inproceedings{ghosh2023,
  author    = {Ghosh, Avrajit and Lyu, He and Zhang, Xitong and Wang, Rongrong},
  title     = {Implicit regularization in Heavy-ball momentum accelerated stochastic gradient descent},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
  eprint    = {2302.00849},
  archivePrefix = {arXiv},
}""",
    "hairer2006": """@book{hairer2006,
  author    = {Hairer, Ernst and Lubich, Christian and Wanner, Gerhard},
  title     = {Geometric Numerical Integration: Structure-Preserving Algorithms for Ordinary Differential Equations},
  publisher = {Springer},
  edition   = {2},
  year      = {2006},
}""",
    "marion2026": """@misc{marion2026,
  author  = {Marion, Pierre},
  title   = {Edge Flow: A Tractable and Predictive Continuous-Time Model for Gradient Descent at the Edge of Stability},
  year    = {2026},
  eprint  = {2606.18080},
  archivePrefix = {arXiv},
}""",
    "debussche2012": """@article{debussche2012,
  author  = {Debussche, Arnaud and Faou, Erwan},
  title   = {Weak Backward Error Analysis for {SDEs}},
  journal = {SIAM Journal on Numerical Analysis},
  year    = {2012},
  eprint  = {1105.0489},
  archivePrefix = {arXiv},
}""",
    "gess2024": """@article{gess2024,
  author  = {Gess, Benjamin and Kassing, Sebastian and Konarovskyi, Vitalii},
  title   = {Stochastic Modified Flows, Mean-Field Limits and Dynamics of Stochastic Gradient Descent},
  journal = {Journal of Machine Learning Research},
  year    = {2024},
  eprint  = {2302.07125},
  archivePrefix = {arXiv},
}""",
    "leimkuhler2013": """@article{leimkuhler2013,
  author  = {Leimkuhler, Benedict and Matthews, Charles},
  title   = {Rational Construction of Stochastic Numerical Methods for Molecular Sampling},
  journal = {Applied Mathematics Research eXpress},
  year    = {2013},
  eprint  = {1203.5428},
  archivePrefix = {arXiv},
}""",
    "li2017": """@inproceedings{li2017,
  author    = {Li, Qianxiao and Tai, Cheng and E, Weinan},
  title     = {Stochastic Modified Equations and Adaptive Stochastic Gradient Algorithms},
  booktitle = {International Conference on Machine Learning},
  year      = {2017},
  eprint    = {1511.06251},
  archivePrefix = {arXiv},
}""",
    "li2019": """@article{li2019,
  author  = {Li, Qianxiao and Tai, Cheng and E, Weinan},
  title   = {Stochastic Modified Equations and Dynamics of Stochastic Gradient Algorithms {I}: Mathematical Foundations},
  journal = {Journal of Machine Learning Research},
  year    = {2019},
  eprint  = {1811.01558},
  archivePrefix = {arXiv},
}""",
    "miyagawa2022": """@inproceedings{miyagawa2022,
  author    = {Miyagawa, Taiki},
  title     = {Toward Equation of Motion for Deep Neural Networks: Continuous-time Gradient Descent and Discretization Error Analysis},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022},
  eprint    = {2210.15898},
  archivePrefix = {arXiv},
}""",
    "regis2026": """@misc{regis2026,
  author  = {Regis, Eric and Chewi, Sinho},
  title   = {Rod Flow: A Continuous-Time Model for Gradient Descent at the Edge of Stability},
  year    = {2026},
  eprint  = {2602.01480},
  archivePrefix = {arXiv},
}""",
    "regis2026adam": """@misc{regis2026adam,
  author  = {Regis, Eric and Chewi, Sinho},
  title   = {A Rod Flow Model for {Adam} at the Edge of Stability},
  year    = {2026},
  eprint  = {2605.06821},
  archivePrefix = {arXiv},
}""",
    "rosca2023": """@article{rosca2023,
  author  = {Rosca, Mihaela and Wu, Yan and Qin, Chongli and Dherin, Benoit},
  title   = {On a continuous time model of gradient descent dynamics and instability in deep learning},
  journal = {Transactions on Machine Learning Research},
  year    = {2023},
  eprint  = {2302.01952},
  archivePrefix = {arXiv},
}""",
    "smith2021": """@inproceedings{smith2021,
  author    = {Smith, Samuel L. and Dherin, Benoit and Barrett, David G. T. and De, Soham},
  title     = {On the Origin of Implicit Regularization in Stochastic Gradient Descent},
  booktitle = {International Conference on Learning Representations},
  year      = {2021},
  eprint    = {2101.12176},
  archivePrefix = {arXiv},
}""",
    "zygalakis2011": """@article{zygalakis2011,
  author  = {Zygalakis, Konstantinos C.},
  title   = {On the Existence and the Applications of Modified Equations for Stochastic Differential Equations},
  journal = {SIAM Journal on Scientific Computing},
  year    = {2011},
}""",
}


def own_entry() -> str:
    """Return the entry of this package; the same data are in CITATION.cff, which no wheel contains."""
    return f"""@misc{{eomdl,
  author  = {{{{The eomdl authors}}}},
  title   = {{eomdl: a modified-equation {{ODE}} solver for gradient descent}},
  note    = {{Software, version {version("eomdl")}}},
}}"""


def citation(flow: AbstractFlow) -> str:
    """Return BibTeX of what to cite for a flow: this package, then the papers that the flow is from.

    ```python
    print(eomdl.citation(eomdl.EquationOfMotion(loss, learning_rate=0.1, order=1)))
    ```

    The flow's class names them in `references`. For a flow of your own without any, only the package's entry.

    **Raises:** `ValueError` for anything but a flow, and for a reference that is neither a key of this package's
    list nor a BibTeX entry.
    """
    _check.kind("flow", flow, AbstractFlow, "an eomdl.AbstractFlow")
    return "\n\n".join([own_entry(), *map(_entry, flow.references)])


def _entry(reference: str) -> str:
    entry = ENTRIES.get(reference, reference)
    if not isinstance(entry, str) or not re.match(r"@\w+\{", entry):
        raise ValueError(
            f"flow.references: expected keys of {sorted(ENTRIES)} or BibTeX entries, got {_check.show(reference)}"
        )
    return entry

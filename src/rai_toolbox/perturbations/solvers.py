"""The solvers: what is worst for a model, near given data."""

from rai_toolbox.perturbations._gradient_ascent import gradient_ascent
from rai_toolbox.perturbations._minimum_norm import minimum_norm
from rai_toolbox.perturbations._random_restart import random_restart
from rai_toolbox.perturbations._solution import Solution, UniversalSolution
from rai_toolbox.perturbations._universal import universal
from rai_toolbox.perturbations._worst_case import worst_case

__all__ = [
    "Solution",
    "UniversalSolution",
    "gradient_ascent",
    "minimum_norm",
    "random_restart",
    "universal",
    "worst_case",
]

"""Optimizers that transform gradients and parameters, and worst-case perturbation solvers on top of them."""

from rai_toolbox._freezing import evaluating, freeze, frozen
from rai_toolbox._negation import negate
from rai_toolbox._removed import tell_of_removed_modules
from rai_toolbox._version import __version__
from rai_toolbox.functional._layout import to_batch

__all__ = ["__version__", "evaluating", "freeze", "frozen", "negate", "to_batch"]

tell_of_removed_modules()

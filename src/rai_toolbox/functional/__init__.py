"""Pure functions of tensors: norms, projections, oracles, selection and sampling, per datum."""

from rai_toolbox.functional._layout import datum_ndim, to_batch
from rai_toolbox.functional._norms import lp_norm, normalize, normalize_

__all__ = ["datum_ndim", "lp_norm", "normalize", "normalize_", "to_batch"]

"""Pure functions of tensors: norms, projections, oracles, selection and sampling, per datum."""

from rai_toolbox.functional._layout import datum_ndim, to_batch
from rai_toolbox.functional._norms import lp_norm, normalize
from rai_toolbox.functional._oracles import (
    lmo_l1_ball,
    lmo_l1_ball_,
    lmo_l1q_ball,
    lmo_l1q_ball_,
    lmo_l2_ball,
    lmo_l2_ball_,
    lmo_linf_ball,
    lmo_linf_ball_,
)
from rai_toolbox.functional._polytopes import project_box, project_box_, project_simplex, project_simplex_
from rai_toolbox.functional._projections import (
    project_l0_ball,
    project_l0_ball_,
    project_l1_ball,
    project_l1_ball_,
    project_l2_ball,
    project_l2_ball_,
    project_linf_ball,
    project_linf_ball_,
)
from rai_toolbox.functional._sampling import uniform_like_l1_n_ball_, uniform_like_l2_n_ball_, uniform_like_linf_n_ball_
from rai_toolbox.functional._scaling import normalize_
from rai_toolbox.functional._selection import signed_top_q, signed_top_q_, top_q, top_q_
from rai_toolbox.functional._spectral_ball import (
    lmo_spectral_ball,
    lmo_spectral_ball_,
    polar,
    polar_,
    project_spectral_ball,
    project_spectral_ball_,
)
from rai_toolbox.functional._spheres import project_l2_sphere, project_l2_sphere_

__all__ = [
    "datum_ndim",
    "lmo_l1_ball",
    "lmo_l1_ball_",
    "lmo_l1q_ball",
    "lmo_l1q_ball_",
    "lmo_l2_ball",
    "lmo_l2_ball_",
    "lmo_linf_ball",
    "lmo_linf_ball_",
    "lmo_spectral_ball",
    "lmo_spectral_ball_",
    "lp_norm",
    "normalize",
    "normalize_",
    "polar",
    "polar_",
    "project_box",
    "project_box_",
    "project_l0_ball",
    "project_l0_ball_",
    "project_l1_ball",
    "project_l1_ball_",
    "project_l2_ball",
    "project_l2_ball_",
    "project_l2_sphere",
    "project_l2_sphere_",
    "project_linf_ball",
    "project_linf_ball_",
    "project_simplex",
    "project_simplex_",
    "project_spectral_ball",
    "project_spectral_ball_",
    "signed_top_q",
    "signed_top_q_",
    "to_batch",
    "top_q",
    "top_q_",
    "uniform_like_l1_n_ball_",
    "uniform_like_l2_n_ball_",
    "uniform_like_linf_n_ball_",
]

"""Exact mathematics on the small matrices of multi-task gradients.

The methods' functions take the Gram matrix G = J Jᵀ of the m gradients (rows) of J, shape (m, m), and return weights of
the rows, w or a matrix of them: the direction is d = Jᵀ w. All of them compute in float64, keep no state, and know no
absolute length: the answer for s·J follows from the answer for J for every s > 0 (as long as the entries of G stay
within 1e-300 and 1e300).

Three habits run through all of it:

* **Unit rows.** Problems are solved for the cosines C_ij = G_ij / (n_i n_j), n_i = √G_ii, with unknowns v_i = w_i n_i.
  Rows of length 1e-6 and 1e6 then weigh the same, and every tolerance can be stated relative to the rows.
* **A factor on request.** A Gram matrix squares the condition number: angles below 1e-8 are lost in it. Functions with
  a ``factor`` argument measure how far the Gram can be trusted and, where it cannot, call ``factor()`` for a matrix B
  of shape (m, k) with B Bᵀ = J Jᵀ to row accuracy (the triangle of a QR decomposition of Jᵀ, or J itself).
* **Verified answers.** What an inequality, a factorisation or an iteration decides is checked by the conditions that
  define it, whoever found it. Functions with a ``flag`` argument call it with "not-converged" where they do not hold to
  rounding (linear programs: to the 1e-9 that their solver rounds to); without it that is an error.
"""

from gradsurgery.geometry.balance import align, equal_projection
from gradsurgery.geometry.bargaining import power_fixed_point
from gradsurgery.geometry.cones import closest_point, dual_cone, frank_wolfe, is_crowded, min_norm, project_simplex
from gradsurgery.geometry.descent import is_descent, moved_inside, shift
from gradsurgery.geometry.linear import best_corner
from gradsurgery.geometry.pairwise import gradvac_mixing, pcgrad_mixing, pcgrad_of_two, streaming_pcgrad
from gradsurgery.geometry.ratio import toward_ratio
from gradsurgery.geometry.units import EPS, unit, unit_rows
from gradsurgery.geometry.worst_case import cagrad, conic

__all__ = [
    "EPS",
    "align",
    "best_corner",
    "cagrad",
    "closest_point",
    "conic",
    "dual_cone",
    "equal_projection",
    "frank_wolfe",
    "gradvac_mixing",
    "is_crowded",
    "is_descent",
    "min_norm",
    "moved_inside",
    "pcgrad_mixing",
    "pcgrad_of_two",
    "power_fixed_point",
    "project_simplex",
    "shift",
    "streaming_pcgrad",
    "toward_ratio",
    "unit",
    "unit_rows",
]

"""What is right, as functions that can be pointed at any implementation.

Four kinds of question: a method of your own as a whole (:func:`check`), the properties that papers promise
(``assert_…``), fixed inputs with exact answers (:func:`check_reference`), and the places where public implementations
went wrong (``DEFECTS``, put to a :class:`Library` by :func:`examine`).
"""

from gradsurgery.testing.adapters import Library, Training, import_peer, ours
from gradsurgery.testing.contract import Checked, check
from gradsurgery.testing.defects import DEFECTS, Defect, Verdict, examine
from gradsurgery.testing.peers import PEERS
from gradsurgery.testing.properties import (
    assert_common_descent,
    assert_equal_rows,
    assert_homogeneous,
    assert_ignores_copies,
    assert_min_norm,
    assert_permutation_equivariant,
    assert_plain_sum_without_conflict,
    assert_rotation_equivariant,
    assert_row_scale_invariant,
)
from gradsurgery.testing.reference import (
    ReferenceCase,
    check_reference,
    reference,
    reference_cases,
    reference_errors,
    reference_methods,
)

__all__ = [
    "DEFECTS",
    "PEERS",
    "Checked",
    "Defect",
    "Library",
    "ReferenceCase",
    "Training",
    "Verdict",
    "assert_common_descent",
    "assert_equal_rows",
    "assert_homogeneous",
    "assert_ignores_copies",
    "assert_min_norm",
    "assert_permutation_equivariant",
    "assert_plain_sum_without_conflict",
    "assert_rotation_equivariant",
    "assert_row_scale_invariant",
    "check",
    "check_reference",
    "examine",
    "import_peer",
    "ours",
    "reference",
    "reference_cases",
    "reference_errors",
    "reference_methods",
]

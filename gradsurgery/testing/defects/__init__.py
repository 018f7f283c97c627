"""Where public implementations went wrong: each case with its question, the right answer, and a check.

Every case was seen in a published library or in widely copied code. A case is put to any :class:`Library` that offers
its method; what a library does not have cannot be wrong there.
"""

from __future__ import annotations

from gradsurgery.testing.defects import balances, cones, pairs, rows, state, weights
from gradsurgery.testing.defects.cases import Defect as Defect
from gradsurgery.testing.defects.cases import Verdict as Verdict
from gradsurgery.testing.defects.cases import examine as examine

#: All cases, in the order in which the page on conformance shows them.
DEFECTS = [*state.CASES, *pairs.CASES, *cones.CASES, *balances.CASES, *rows.CASES, *weights.CASES]

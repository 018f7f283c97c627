"""State that does not survive a checkpoint."""

from __future__ import annotations

import numpy as np

from gradsurgery.testing.defects.cases import (
    Defect,
    assert_resumes,
    into,
    steps_of_two,
)

CASES: list[Defect] = []
_case = into(CASES)

for _method, _options in (("GradVac", {"beta": 0.5}), ("PCD", {}), ("ExcessMTL", {}), ("NashMTL", {"every": 10})):
    _case(
        f"ST1 {_method}",
        _method,
        asked="three steps, the state into a fresh instance, the fourth step",
        right="as without the interruption",
        seen="TorchJD: loading raises, or the next step differs; others keep such state outside any state_dict",
    )(lambda make, options=_options: assert_resumes(make, steps_of_two(4), **options))  # type: ignore[misc]

_HISTORY = np.array([[4.0, 4.0], [3.0, 3.9], [2.5, 2.0], [2.4, 1.9], [1.2, 1.8]])
for _method in ("DWA", "FAMO"):
    _case(
        f"ST1 {_method}",
        _method,
        "weights",
        asked="some steps, the state into a fresh instance, one more step",
        right="as without the interruption",
        seen="TorchJD: loads, and the next step differs",
    )(lambda make: assert_resumes(make, [_HISTORY[:4], _HISTORY[4:]]))

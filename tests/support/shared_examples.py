"""Hypothesis for tests with many parameters: the examples are drawn once a test function, not once a parameter.

Drawing takes longer than most of the calls that are tested. Where examples are the same in every run, as in `make
test`, they are the same for every parameter too, so nothing is lost by keeping them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import zlib
from collections.abc import Callable

import hypothesis
from hypothesis import strategies as st

Test = Callable[..., None]


def given(**strategies: st.SearchStrategy) -> Callable[[Test], Test]:
    """In place of `hypothesis.given`, for tests without `assume` and without `st.data()`.

    A failing example is handed to Hypothesis itself, which looks for a smaller one. `make explore` draws for every
    parameter anew.
    """

    def decorate(test: Test) -> Test:
        drawing = hypothesis.given(**strategies)(test)
        if not hypothesis.settings.default.derandomize:
            return drawing
        examples = functools.cache(lambda: _drawn(test.__qualname__, strategies))

        @functools.wraps(test)
        def over_all(**parameters: object) -> None:
            for number, example in enumerate(examples()):
                try:
                    test(**parameters, **copy.deepcopy(example))
                except Exception as error:
                    drawing(**parameters)
                    raise AssertionError(f"example {number} of {len(examples())} fails: {example}") from error

        wanted = [p for name, p in inspect.signature(test).parameters.items() if name not in strategies]
        over_all.__signature__ = inspect.Signature(wanted)  # what pytest is to give
        return over_all

    return decorate


def _drawn(name: str, strategies: dict[str, st.SearchStrategy]) -> list[dict[str, object]]:
    """As many examples as the profile says, others for tests of other names."""
    found: list[dict[str, object]] = []

    # How long it takes says something of the machine alone.
    @hypothesis.seed(zlib.crc32(name.encode()))
    @hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.too_slow])
    @hypothesis.given(**strategies)
    def collect(**example: object) -> None:
        found.append(example)

    collect()
    assert len(found) >= hypothesis.settings.default.max_examples, "a strategy with few values needs no drawing"
    return found

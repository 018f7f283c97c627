"""The numbers in the README of the `softadapt` package (Heydari, Thompson & Mehmood, 2019, arXiv 1912.12355)."""

from __future__ import annotations

from typing import Any

import gradsurgery

# Three losses over five epochs, and what the README prints for them, to five digits; β = 0.1.
LOSSES = ([1.0, 2.0, 3.0, 4.0, 5.0], [150.0, 100.0, 50.0, 10.0, 0.1], [1500.0, 1000.0, 500.0, 100.0, 1.0])
PRINTED = {
    "SoftAdapt": ("9.9343e-01", "6.5666e-03", "3.8908e-22"),
    "NormalizedSoftAdapt": ("3.2207e-01", "3.2508e-01", "3.5285e-01"),
    "LossWeightedSoftAdapt": ("8.7978e-01", "1.2022e-01", "7.1234e-20"),
}
WEIGHTERS = {
    "SoftAdapt": gradsurgery.SoftAdaptWeighter,
    "NormalizedSoftAdapt": gradsurgery.NormalizedSoftAdaptWeighter,
    "LossWeightedSoftAdapt": gradsurgery.LossWeightedSoftAdaptWeighter,
}


def run(quick: bool = False) -> dict[str, Any]:
    """The weights of the three variants, printed as in the README.

    Args:
        quick: Makes no difference: it takes no time.

    Returns:
        For each variant, what is printed there and what is found here.
    """
    return {
        name: {
            "printed": list(PRINTED[name]),
            "found": [f"{w:.4e}" for w in weighter.get_component_weights(*LOSSES, beta=0.1).tolist()],
        }
        for name, weighter in WEIGHTERS.items()
    }

"""Moved to :mod:`gradsurgery.gradients.accumulated`."""

from gradsurgery.text import moved

__getattr__ = moved(
    __name__,
    {
        "Kept": "gradsurgery.gradients.accumulated:Accumulated",
    },
    removed_in="1.0",
)

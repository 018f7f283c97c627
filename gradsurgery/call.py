"""Moved to :mod:`gradsurgery.batch`."""

from gradsurgery.text import moved

__getattr__ = moved(
    __name__,
    {
        "Call": "gradsurgery.batch:Batch",
        "parameters": "gradsurgery.batch:parameters",
        "require_reached": "gradsurgery.batch:require_reached",
        "representation": "gradsurgery.batch:representation",
    },
    removed_in="1.0",
)

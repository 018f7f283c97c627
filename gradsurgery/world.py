"""Moved to :mod:`gradsurgery.communication`."""

from gradsurgery.text import moved

__getattr__ = moved(
    __name__,
    {
        "World": "gradsurgery.communication:Processes",
    },
    removed_in="1.0",
)

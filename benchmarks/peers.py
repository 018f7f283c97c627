"""Print what pip is to install for the comparisons, a requirement a line: ``python -m benchmarks.peers``."""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement


def peers() -> list[str]:
    """The requirements of the extra "peers" that apply to this Python, without their markers."""
    found = []
    for line in requires("gradsurgery") or []:
        need = Requirement(line)
        if need.marker and need.marker.evaluate({"extra": "peers"}) and not need.marker.evaluate({"extra": ""}):
            need.marker = None
            found.append(str(need))
    return found


if __name__ == "__main__":
    print(*peers(), sep="\n")

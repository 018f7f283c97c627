"""The page on GPUs, from what a run has kept as JSON; without a run on a GPU it says that nothing was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import LARGE
from benchmarks.gpu.sections import SECTIONS

HEAD = """# On a GPU

{measured}

`make gpu` measures in one run of at most eight minutes, on one GPU, and writes this page and `gpu.json` beside it.
Every section has a part of the time; what fails, and what there was no time for, is listed.
`make gpu ARGS="--device cpu --quick"` shows in a minute, on any machine, that the script works.

| section | what it does |
| --- | --- |
| right results | every engine on the device, in float32, against rows in float64 on the CPU |
| tests | the tests of this library that need a GPU |
| compiled models | `torch.compile(mode="reduce-overhead")`: gradients against eager ones, and step times |
| time and memory | the backward phase at GPU sizes, beside the plain sum, m bare passes and TorchJD: {models} |
| waits and kernels | how often one call waits for the device, and how many kernels it launches |
| batched passes below the trunk | on narrow models: m passes through the trunk against one that is batched |
"""
NOT_MEASURED = "**Not measured.** No figure of this library comes from a GPU so far."
COLUMNS = {
    "results": ["model", "candidate", "distance", "most"],
    "tests": ["file", "result"],
    "compiled": ["model", "candidate", "distance", "milliseconds", "to_plain"],
    "large": ["model", "candidate", "milliseconds", "to_floor", "to_plain", "memory"],
    "waits": ["model", "candidate", "waits", "calls that wait", "copies to the host", "kernels", "operators"],
    "batched": ["model", "tasks", "milliseconds, one by one", "milliseconds, together", "milliseconds, PCGrad",
                "to_one_by_one"],
}  # fmt: skip


def write(path: Path, run: dict[str, Any]) -> None:
    """Keep what was measured, and write the page.

    Args:
        path: Where the page is to be; the figures go beside it.
        run: What was measured.
    """
    path.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    path.write_text(text(run), encoding="utf-8")


def text(run: dict[str, Any] | None) -> str:
    """The page.

    Args:
        run: What was measured, or None.

    Returns:
        Markdown.
    """
    names = "; ".join(f"{name}, {what}" for name, (what, _, _) in LARGE.items())
    if run is None:
        return HEAD.format(measured=NOT_MEASURED, models=names)
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    where = f"Measured on {run['machine']}; {versions}; {run['seconds']:.0f} seconds."
    if run["missing"]:
        where += f" Not installed: {', '.join(run['missing'])}."
    if run["device"] != "cuda":
        where = f"{NOT_MEASURED} What follows shows that the script works, on {run['machine']}" + (
            ", with tiny models." if run["quick"] else "."
        )
    return HEAD.format(measured=where, models=names) + "".join(
        section(name, found) for name, found in run["sections"].items()
    )


def section(name: str, found: dict[str, Any]) -> str:
    """What one section has found.

    Args:
        name: The section.
        found: Its rows, and what went wrong with it as a whole.

    Returns:
        Markdown.
    """
    columns = COLUMNS[name]
    good = [r for r in found["rows"] if not ({"failed", "left_out"} & r.keys())]
    bad = [r for r in found["rows"] if "failed" in r]
    late = [r for r in found["rows"] if "left_out" in r]
    lines = [f"\n## {SECTIONS[name][0]}\n", f"{found['seconds']:.0f} seconds.\n"]
    if "failed" in found:
        lines.append(f"**The section ended early:** {found['failed']}\n")
    shown = [r for r in good if len(r.keys() & set(columns)) > (1 if name == "tests" else 2)]
    if shown:
        used = [c for c in columns if any(c in r for r in shown)]
        lines += [f"| {' | '.join(c.replace('_', ' ') for c in used)} |", "| --- " * len(used) + "|"]
        lines += [f"| {' | '.join(cell(r.get(c)) for c in used)} |" for r in shown]
        lines.append("")
    lines += [f"* **Failed:** {about(r)}: {r['failed']}" for r in bad]
    lines += [f"* Left out: {about(r)}, since {r['left_out']}." for r in late]
    return "\n".join(lines).rstrip() + "\n"


def about(row: dict[str, Any]) -> str:
    return ", ".join(str(row[key]) for key in ("model", "candidate", "tasks", "file") if key in row)


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"
    return "" if value is None else str(value)


def failures(run: dict[str, Any]) -> int:
    """How much went wrong.

    Args:
        run: What was measured.

    Returns:
        Number of failed rows and sections.
    """
    sections = run["sections"].values()
    return sum("failed" in s for s in sections) + sum("failed" in r for s in sections for r in s["rows"])

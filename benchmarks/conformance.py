"""Who gets which case right: this library and others, on every defect that was seen somewhere, and on exact answers.

python -m benchmarks.conformance [--peers torchjd conflictfree] [--write docs/conformance.md]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import warnings
from pathlib import Path

import torch

from benchmarks import forms
from gradsurgery import testing

SIGNS = {"right": "right", "wrong": "**wrong**", "error": "**error**", "not offered": "–"}
# How a library is asked for what the reference calls by these names.
ASKED = {
    "MGDA": ("MGDA", {}),
    "UPGrad": ("UPGrad", {}),
    "DualProj": ("DualProj", {}),
    "CAGrad c=0.4": ("CAGrad", {"c": 0.4}),
    "CAGrad c=0.5": ("CAGrad", {"c": 0.5}),
    "IMTL-G": ("IMTLG", {}),
    "Aligned-MTL min": ("AlignedMTL", {}),
    "Aligned-MTL median": ("AlignedMTL", {"scale_mode": "median"}),
    "Aligned-MTL rmse": ("AlignedMTL", {"scale_mode": "rmse"}),
    "ConFIG": ("ConFIG", {}),
    "Nash-MTL": ("NashMTL", {}),
    "FairGrad alpha=0.5": ("FairGrad", {"alpha": 0.5}),
    "FairGrad alpha=1.0": ("FairGrad", {"alpha": 1.0}),
    "FairGrad alpha=2.0": ("FairGrad", {"alpha": 2.0}),
}


def verdicts(libraries: list[testing.Library]) -> list[dict]:
    """One entry a case, with what each library did."""
    return [
        {
            "id": case.id,
            "method": case.method,
            "asked": case.asked,
            "right": case.right,
            "seen": case.seen,
            "verdicts": {library.name: testing.examine(library, case)._asdict() for library in libraries},
        }
        for case in testing.DEFECTS
    ]


def exactness(libraries: list[testing.Library]) -> list[dict]:
    """How many reference inputs each library answers within the tolerance, and within 1e-3."""
    found = []
    for name, (method, options) in ASKED.items():
        cells = {}
        for library in libraries:
            make = library.directions.get(method)
            if make is None:
                continue
            exact = close = 0
            cases = [case.name for case in testing.reference_cases(name) if case.tolerance is not None]
            for case in cases:
                for tolerance in (0.0, 1e-3):
                    try:
                        testing.check_reference(make(**options), name, [case], tolerance)
                    except Exception:  # a wrong answer, or whatever another library may raise
                        continue
                    exact += tolerance == 0
                    close += tolerance > 0
            cells[library.name] = {"exact": exact, "close": close, "of": len(cases)}
        found.append({"method": name, "libraries": cells})
    return found


def table(cases: list[dict], names: list[str]) -> str:
    """A Markdown table library × defect."""
    lines = [
        "| case | method | asked | right | " + " | ".join(names) + " |",
        "| --- | --- | --- | --- |" + " --- |" * len(names),
    ]
    for case in cases:
        cells = [SIGNS[case["verdicts"][name]["outcome"]] for name in names]
        asked = [case[key].replace("|", "\\|") for key in ("asked", "right")]
        lines.append("| " + " | ".join([case["id"].split()[0], case["method"], *asked, *cells]) + " |")
    return "\n".join(lines)


def exactness_table(found: list[dict], names: list[str]) -> str:
    """A Markdown table library × method."""
    names = [name for name in names if any(name in row["libraries"] for row in found)]
    lines = ["| method | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for row in found:
        cells = []
        for name in names:
            cell = row["libraries"].get(name)
            cells.append("–" if cell is None else f"{cell['exact']} ({cell['close']}) of {cell['of']}")
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def misses(cases: list[dict], names: list[str]) -> str:
    """What was seen in this run, by library."""
    parts = []
    for name in names:
        lines = [
            f"* **{case['id'].split()[0]}** {case['method']}: {verdict['detail']}"
            for case in cases
            if (verdict := case["verdicts"][name])["outcome"] in ("wrong", "error")
        ]
        if lines:
            parts.append(f"### {name}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


PAGE = """# Conformance

Written by `make conformance ARGS="--write docs/conformance.md"`; the verdicts are those of that run, with torch {torch}
and {versions}.

Every case below was seen in a published library or in widely copied code. The same question is put to this library and
to those on PyPI that offer the method and install next to a current torch. "–": not offered. "error": an exception
instead of an answer. The cases are defects that somebody had, some of them these very libraries, and this library was
changed until it had none: they are no sample of anything, each library is asked another part of them, and so there are
no totals. `gradsurgery.testing` has the cases and the adapters; your own implementation can be asked too:

```python
from gradsurgery.testing import DEFECTS, Library, examine

mine = Library("mine", directions={{"MGDA": lambda: lambda rows, losses=None: rows.mean(axis=0)}})
wrong = [case.id for case in DEFECTS if examine(mine, case).outcome in ("wrong", "error")]
assert "MG1" in wrong
```

{table}

{written}
## Exact answers

How many of the reference inputs each library answers to 1e-9 in float64 (or what the input allows), and in brackets
to 1e-3. The inputs include near-parallel and opposite rows, zero rows, rank deficiency and lengths from 1e-6 to 1e6.

{exactness}

## What was seen

{misses}
"""


def main() -> int:
    """Run what the command line asks for, and print or write the tables.

    Returns:
        The exit status: 1 if this library gets a case wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=list(testing.PEERS), default=list(testing.PEERS))
    parser.add_argument("--write", type=Path, help="write the page here, and the verdicts beside it as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the solvers of others
    libraries, versions = [testing.ours()], []
    for package in options.peers:
        try:
            libraries.append(testing.PEERS[package]())
        except RuntimeError as error:
            print(f"left out: {error}")
        else:
            versions.append(f"{package} {importlib.metadata.version(package)}")
    names = [library.name for library in libraries]
    cases, found, written = verdicts(libraries), exactness(libraries), forms.ask_all()
    parts = [table(cases, names), forms.section(written), exactness_table(found, names), misses(cases, names)]
    print(*parts, sep="\n\n")
    if options.write:
        options.write.write_text(
            PAGE.format(
                torch=torch.__version__,
                versions=", ".join(versions) or "nothing else",
                table=parts[0],
                written=parts[1],
                exactness=parts[2],
                misses=parts[3],
            )
        )
        kept = {"cases": cases, "written": written, "exact": found}
        options.write.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    ours = [case["verdicts"]["gradsurgery"]["outcome"] for case in cases]
    ours += [form["answers"]["gradsurgery"]["outcome"] for form in written["forms"]]
    return int(any(outcome != "right" for outcome in ours))


if __name__ == "__main__":
    raise SystemExit(main())

"""Who gets which case right: this library and others, on every defect that was seen somewhere, and on exact answers.

python -m benchmarks.conformance [--peers torchjd conflictfree] [--write docs/conformance.md]
python -m benchmarks.conformance --again docs/conformance.md    writes the pages from the verdicts beside them
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import warnings
from pathlib import Path

import torch

from benchmarks import forms, two_pages
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
        "| case | method | question: *the right answer* | " + " | ".join(names) + " |",
        "| --- | --- | --- |" + " --- |" * len(names),
    ]
    for case in cases:
        cells = [SIGNS[case["verdicts"][name]["outcome"]] for name in names]
        asked = [case["asked"].replace("|", "\\|"), "*" + case["right"].replace("|", "\\|").replace("*", "\\*") + "*"]
        lines.append("| " + " | ".join([case["id"].split()[0], case["method"], ": ".join(asked), *cells]) + " |")
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

Which known defects does each library have? Every case was found in a published library or in widely copied code. This
library is tested on all of them, and so is every library on PyPI that offers the method and installs next to a current
torch.

![One square per case and library: right, wrong, error or not offered](_static/conformance/conformance.png)

*Error* means an exception instead of an answer. [The tables](conformance-tables.md) list each question, the right
answer and what each library did.

Do not read the picture as a ranking. The cases were collected because some library failed them, often one of those in
the picture, and this library was changed until it passed them all. They are not a random sample, and each library
answers only the cases whose method it offers. That is why there are no totals.

## Test your own code

`gradsurgery.testing` has the cases and the adapters:

```python
from gradsurgery.testing import DEFECTS, Library, examine


def average(rows, losses=None):  # no MGDA
    return rows.mean(axis=0)


mine = Library("mine", directions={"MGDA": lambda: average})
outcomes = {case.id: examine(mine, case).outcome for case in DEFECTS}
assert outcomes["MG1"] == "wrong"
```
"""

TABLES = """---
hide-toc: true
---

# Conformance: the tables

The full tables behind [the page on conformance](conformance.md). `make conformance ARGS="--write docs/conformance.md"`
runs all cases and writes both pages. This run had torch {torch} and {versions}. "–": not offered. "error": an exception
instead of an answer.

## All cases

{table}

{written}
## Exact answers

How many of the reference inputs each library answers to within 1e-9 in float64 (or what the input allows), and in
brackets to within 1e-3. The inputs include near-parallel and opposite rows, zero rows, rank deficiency and lengths from
1e-6 to 1e6.

{exactness}

## Wrong answers and errors

{misses}
"""


def tables(data: dict) -> str:
    """The second page.

    Args:
        data: What is kept as JSON.

    Returns:
        Markdown.
    """
    cases, names = data["cases"], list(data["cases"][0]["verdicts"])
    others = {name: version for name, version in data["versions"].items() if name != "torch"}
    return TABLES.format(
        torch=data["versions"]["torch"],
        versions=", ".join(f"{name} {version}" for name, version in others.items()) or "nothing else",
        table=table(cases, names),
        written=forms.section(data["written"]),
        exactness=exactness_table(data["exact"], names),
        misses=misses(cases, names),
    )


def write(path: Path, data: dict) -> None:
    """Write both pages and the picture.

    Args:
        path: The first page.
        data: What is kept as JSON.
    """
    names = list(data["cases"][0]["verdicts"])
    outcomes = {(name, case["id"]): case["verdicts"][name]["outcome"] for case in data["cases"] for name in names}
    figure = two_pages.squares(names, [case["id"] for case in data["cases"]], outcomes)
    two_pages.save(path, PAGE, tables(data), figure)


def main() -> int:
    """Run what the command line asks for, and print or write the tables.

    Returns:
        The exit status: 1 if this library gets a case wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=list(testing.PEERS), default=list(testing.PEERS))
    parser.add_argument("--write", type=Path, help="write the page here, and the verdicts beside it as JSON")
    parser.add_argument("--again", type=Path, help="write this page from the verdicts beside it, and ask nobody")
    options = parser.parse_args()
    if options.again:
        write(options.again, json.loads(options.again.with_suffix(".json").read_text(encoding="utf-8")))
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the solvers of others
    libraries, versions = [testing.ours()], {"torch": torch.__version__}
    for package in options.peers:
        try:
            libraries.append(testing.PEERS[package]())
        except RuntimeError as error:
            print(f"left out: {error}")
        else:
            versions[package] = importlib.metadata.version(package)
    names = [library.name for library in libraries]
    cases, found, written = verdicts(libraries), exactness(libraries), forms.ask_all()
    parts = [table(cases, names), forms.section(written), exactness_table(found, names), misses(cases, names)]
    print(*parts, sep="\n\n")
    if options.write:
        kept = {"versions": versions, "cases": cases, "written": written, "exact": found}
        options.write.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
        write(options.write, kept)
    ours = [case["verdicts"]["gradsurgery"]["outcome"] for case in cases]
    ours += [form["answers"]["gradsurgery"]["outcome"] for form in written["forms"]]
    return int(any(outcome != "right" for outcome in ours))


if __name__ == "__main__":
    raise SystemExit(main())

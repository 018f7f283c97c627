"""Everything that needs a GPU, in one run.

    python -m benchmarks.gpu [--minutes 8] [--sections results waits] [--write docs/gpu.md]
    python -m benchmarks.gpu --device cpu --quick

Right results of all engines, the tests that need a GPU, compiled models whose graphs are replayed, time and memory at
GPU sizes beside other libraries, waits for the device and kernels, and batched passes. Each section has its share of
the time. What fails is kept with the rest, and the program then ends with 1.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidates import missing
from benchmarks.gpu import page
from benchmarks.gpu.sections import SECTIONS, Section
from benchmarks.steps import versions
from benchmarks.workloads import machine


def take(name: str, device: torch.device, quick: bool, seconds: float) -> dict[str, Any]:
    """Run one section.

    Args:
        name: The section.
        device: Where.
        quick: Only show that it works.
        seconds: How long it may take.

    Returns:
        Its rows; under "failed" what it ended with, if it did not end by itself.
    """
    begin = time.monotonic()
    section = Section(device, quick, begin + seconds)
    found: dict[str, Any] = {"rows": section.rows}
    try:
        SECTIONS[name][1](section)
    except Exception as error:  # the other sections are worth having
        traceback.print_exc()
        found["failed"] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
    found["seconds"] = time.monotonic() - begin
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run all sections, and write what they found.

    Args:
        arguments: The command line.

    Returns:
        1 if anything failed, and 0 otherwise.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds: does the script work?")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--write", type=Path, help="the page; by default docs/gpu.md if this is a whole run on a GPU")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print('There is no GPU here. ARGS="--device cpu --quick" shows that the script works.', file=sys.stderr)
        return 1
    whole = device.type == "cuda" and not options.quick and options.sections == list(SECTIONS)
    path = options.write or (Path("docs/gpu.md") if whole else None)
    warnings.simplefilter("ignore")
    run: dict[str, Any] = {
        "machine": machine(options.device),
        "device": device.type,
        "quick": options.quick,
        "versions": versions(),
        "missing": missing(),
        "seconds": 0.0,
        "sections": {},
    }
    shares = sum(SECTIONS[name][2] for name in options.sections)
    begin, left = time.monotonic(), 60 * options.minutes - 10.0  # for the start, and for writing
    gc.freeze()  # memory is collected before each measurement, and what was imported is no part of that
    try:
        for name in options.sections:
            # What earlier sections have not used is shared out.
            share = (begin + left - time.monotonic()) * SECTIONS[name][2] / shares
            shares -= SECTIONS[name][2]
            run["sections"][name] = take(name, device, options.quick, share)
            run["seconds"] = time.monotonic() - begin
            print(page.section(name, run["sections"][name]), flush=True)
            if path is not None:  # after each: whatever ends the run leaves what there is
                page.write(path, run)
    finally:
        gc.unfreeze()
    failed = page.failures(run)
    print(f"{run['seconds']:.0f} seconds, {failed} failures.")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Run what papers show of their methods on small problems, and compare.

    python -m benchmarks.published [--quick] [--only basin valleys ...] [--write docs/published.md]

Everything is computed in one process and one thread. `--write` stores the results beside the page as JSON, draws the
pictures and writes both pages; with `--only`, kept results of the other experiments stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.published import basin, page, pinn, scales, softadapt, valleys

EXPERIMENTS = {
    "basin": basin.run,
    "valleys": valleys.run,
    "scales": scales.run,
    "softadapt": softadapt.run,
    "pinn": pinn.run,
}


def main() -> int:
    """Run what the command line asks for, print the verdicts, and write the page.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs; verdicts mean nothing")
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--write", type=Path, help="write the page here; the tables and the results go beside it")
    options = parser.parse_args()
    if options.quick and options.write:
        parser.error("--quick is no basis for a page; leave out --write.")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in options.only:
        start = time.process_time()
        results[name] = EXPERIMENTS[name](options.quick)
        print(f"\n{name}: {time.process_time() - start:.0f} s of processor time", flush=True)
        for claim in page.CLAIMS[name](results[name]):
            print(f"  {claim.verdict}: {claim.paper}: {claim.says}\n      here: {claim.found}", flush=True)
    if options.write:
        kept = options.write.with_suffix(".json")
        if kept.exists():
            results = {**json.loads(kept.read_text(encoding="utf-8")), **results}
        kept.write_text(json.dumps(results, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")
        options.write.write_text(page.write(results), encoding="utf-8")
        second = options.write.with_name(f"{options.write.stem}-tables.md")
        second.write_text(page.tables(results), encoding="utf-8")
        subprocess.run([sys.executable, "docs/figures.py", *page.PICTURES], check=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Train with every method on every problem, and write down what helped. ``python -m benchmarks.evidence --help``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks.evidence import contenders, page, results
from benchmarks.evidence.runner import Store, estimate, progress, run
from benchmarks.evidence.training import PROBLEMS, Plan


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a third of the steps, two rates, one seed: minutes")
    parser.add_argument("--problems", metavar="A;B", help=f"names with semicolons between: {'; '.join(PROBLEMS)}")
    parser.add_argument("--methods", metavar="A,B", help="names with commas between; the baselines always take part")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="trainings at once (%(default)s)")
    parser.add_argument("--results", type=Path, help="where single trainings are kept (out/evidence/trainings.jsonl)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write this page, its pictures and its data")
    parser.add_argument("--again", type=Path, metavar="PAGE", help="write this page again from the data beside it")
    parser.add_argument("--no-training", action="store_true", help="only look at what there is")
    parser.add_argument("--no-progress", action="store_true", help="no bars")
    return parser


def planned(args: argparse.Namespace) -> Plan:
    problems = tuple(name.strip() for name in args.problems.split(";")) if args.problems else tuple(PROBLEMS)
    known = contenders.names()
    wanted = [name.strip() for name in args.methods.split(",")] if args.methods else known
    for name, among in (*((p, PROBLEMS) for p in problems), *((w, known) for w in wanted)):
        if name not in among:
            raise SystemExit(f"evidence: there is no {name!r}. There are: {'; '.join(among)}.")
    who = tuple(name for name in known if name in wanted or name in (contenders.SUM, contenders.TUNED))
    if args.quick:
        return Plan(problems, who, rates=2, vectors=3, seeds=(1,), share=1 / 3)
    return Plan(problems, who)


def costs(plan: Plan, store: Store) -> results.Data:
    """The price of a step, measured once for a file of results."""
    known = store.records.get("prices", {}).get("costs", {})
    timed = set.union(set(), *(cost["ratio"] for cost in known.values()))
    if not set(plan.contenders) - {contenders.TUNED} <= timed:
        known = results.prices(plan)
        store.add({"key": "prices", "costs": known})
    return known


def main() -> int:
    args = arguments().parse_args()
    if args.again:
        page.write(args.again, results.again(json.loads(args.again.with_suffix(".json").read_text(encoding="utf-8"))))
        return 0
    plan = planned(args)
    folder = Path("out") / ("evidence-quick" if args.quick else "evidence")
    store = Store(args.results or folder / "trainings.jsonl")
    if not args.no_training:
        minutes = estimate(plan) / 60
        print(f"The whole plan takes some {minutes:.0f} minutes of processor time, {args.jobs} trainings at once.")
        try:
            with progress(plan, store, shown=not args.no_progress) as watch:
                run(plan, store, args.jobs, watch)
        except KeyboardInterrupt:
            sys.stderr.write("Stopped. What is finished is kept; the same command goes on.\n")
            return 130
    data = results.summary(plan, store.records, costs(plan, store))
    if args.write:
        page.write(args.write, data)
        print(f"Wrote {args.write}.")
    print(page.brief(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())

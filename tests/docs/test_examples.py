"""Every example runs as a user would run it, is short, and says in a line or two what came out."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

# Those that need a framework are run by the tests of that framework.
FRAMEWORKS = re.compile(r"^\s*(import|from) (lightning|accelerate|transformers)\b", re.MULTILINE)
EXAMPLES = [
    path
    for path in sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))
    if not FRAMEWORKS.search(path.read_text(encoding="utf-8"))
]


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path, monkeypatch, capsys):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    monkeypatch.chdir(tmp_path)
    if "torchrun --nproc-per-node 2" in path.read_text(encoding="utf-8"):
        run = subprocess.run(
            [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--nproc-per-node", "2", str(path)],
            capture_output=True, text=True, timeout=500, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path.parent.parent)},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert 1 <= len(run.stdout.splitlines()) <= 2
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            runpy.run_path(str(path), run_name="__main__")
        finally:
            torch._dynamo.reset()
    out, err = capsys.readouterr()
    assert 1 <= len(out.splitlines()) <= 2
    assert err == ""
    assert not any(tmp_path.iterdir())

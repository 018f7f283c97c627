"""Every example runs as a user would run it, is short, and says in a line or two what came out."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import socket
import warnings
from pathlib import Path

import pytest
import torch

from tests.support.processes import start

# Those that need a framework are run by the tests of that framework.
FRAMEWORKS = re.compile(r"^\s*(import|from) (lightning|accelerate|transformers)\b", re.MULTILINE)
EXAMPLES = [
    path
    for path in sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))
    if not FRAMEWORKS.search(path.read_text(encoding="utf-8"))
]


def as_under_torchrun(rank, path, folder, size, port):
    """One of the processes that torchrun would start, with the variables that it would set."""
    os.environ.update(
        RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{size}", LOCAL_WORLD_SIZE=f"{size}",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}",
    )  # fmt: skip
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    with (folder / f"{rank}").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(path), run_name="__main__")


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path, monkeypatch, capsys):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    monkeypatch.chdir(tmp_path)
    if "torchrun --nproc-per-node 2" in path.read_text(encoding="utf-8"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        start(as_under_torchrun, (path, tmp_path, 2, port), 2)
        said = [line for rank in range(2) for line in (tmp_path / f"{rank}").read_text(encoding="utf-8").splitlines()]
        assert 1 <= len(said) <= 2
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

"""What is read of tensors on the host: where a device would be waited for."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradsurgery.weighting import deferred

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "__complex__")


class Reads(TorchFunctionMode):
    """Counts what reads a tensor on the host; on the CPU not all of that reaches the dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        # By name: what is on the CPU already is sent to the device of another tensor.
        to_host = name == "to" and "cpu" in [a for a in (*args[1:], *(kwargs or {}).values()) if isinstance(a, str)]
        number = func is torch.where and not all(isinstance(a, Tensor) for a in args)  # is copied, and waited for
        if number or func in [getattr(Tensor, read) for read in READS] or to_host or func is torch.equal:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """Counts the operator with which every read of a tensor on a device ends, and what a boolean mask needs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"):
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextmanager
def reads(monkeypatch):
    """What is read on the host in here; the look at the previous call is told apart."""
    function, dispatch, late = Reads(), Scalars(), []
    original = deferred.Late.read

    def read(self):
        with torch._C.DisableTorchFunction():
            found = original(self)
        late.append(found[0])
        return found

    with monkeypatch.context() as patch, function, dispatch:
        patch.setattr(deferred.Late, "read", read)
        yield function.seen, dispatch.seen, late

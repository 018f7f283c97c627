"""All that the library reads of torch beyond its public interface, and of Lightning.

No other module does. Any release of these may rename or drop what is read here, so this is the place to look at, and to
mend, when one does. Where nothing else is said, a missing attribute is an AttributeError, as if it were read directly.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function
from torch.utils.hooks import RemovableHandle

# ------------------------------------------------------------------------------------------- nodes of a graph


def metadata(node: Any) -> Any:
    """What a node of a graph knows of its outputs.

    Args:
        node: The node.

    Returns:
        A sequence; each entry has a shape, a dtype and a device.
    """
    return node._input_metadata


def saved(node: Any, name: str) -> Any:
    """What a node of a graph has saved for the backward pass.

    Args:
        node: The node.
        name: What it is called in torch's derivatives.yaml.

    Returns:
        A number, numbers, or a tensor; whoever packed a tensor unpacks it now. A RuntimeError if it was freed.
    """
    return getattr(node, f"_saved_{name}")


def has_saved(node: Any, name: str) -> bool:
    """Whether a node of a graph saves something of a name.

    Args:
        node: The node.
        name: The name.

    Returns:
        True if it does.
    """
    return hasattr(node, f"_saved_{name}")


def raw_saved(node: Any, name: str) -> Any:
    """A tensor that a node of a graph has saved, as it was packed.

    Args:
        node: The node.
        name: What the tensor is called.

    Returns:
        A holder, or several of them.
    """
    return getattr(node, f"_raw_saved_{name}")


def unpack_hook(holder: Any) -> Any:
    """What is called to unpack a saved tensor.

    Args:
        holder: As :func:`raw_saved` returns it.

    Returns:
        A function, or None.
    """
    return getattr(holder, "unpack_hook", None)


@cache
def saved_tensors(kind: type) -> tuple[str, ...]:
    """Names of the tensors that nodes of a kind save.

    Args:
        kind: Class of nodes.

    Returns:
        The names, for :func:`raw_saved`.
    """
    prefix = "_raw_saved_"
    return tuple(attribute.removeprefix(prefix) for attribute in dir(kind) if attribute.startswith(prefix))


def number_of(node: Any) -> int:
    """The number of a node. Each thread counts the nodes that it makes; leaves come after all others.

    Args:
        node: The node.

    Returns:
        Its number.
    """
    return int(node._sequence_nr())


def nodes_made() -> int | None:
    """The number that the next node gets in this thread.

    Returns:
        The number; None where this version of torch does not tell.
    """
    read = getattr(torch._C._autograd, "_get_sequence_nr", None)
    return None if read is None else int(read())


def registrations() -> int | None:
    """How many functions were registered so far in Python, at tensors, nodes, modules and optimizers together.

    Returns:
        A count; None where this version of torch does not tell.
    """
    count: int | None = getattr(RemovableHandle, "next_id", None)
    return count


# ----------------------------------------------------------------------------------------------------- tensors

#: Arithmetic on many tensors in one call.
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_add_ = torch._foreach_add_
foreach_addcmul_ = torch._foreach_addcmul_
foreach_div = torch._foreach_div
foreach_lerp = torch._foreach_lerp
foreach_norm = torch._foreach_norm
foreach_sqrt = torch._foreach_sqrt
#: A context in which subclasses of tensors are plain ones.
without_subclasses = torch._C.DisableTorchFunctionSubclass


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place.

    Args:
        tensor: The tensor.

    Returns:
        A count, which all views of one memory have in common.
    """
    return tensor._version


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that a view is a view of.

    Args:
        tensor: The view.

    Returns:
        Its base; None for what is no view.
    """
    return tensor._base


def hooks_of(tensor: Tensor) -> Any:
    """What was registered at a tensor to look at its gradient.

    Args:
        tensor: The tensor.

    Returns:
        A dict, or None.
    """
    return tensor._backward_hooks


def hooks_after(tensor: Tensor) -> Any:
    """What was registered at a leaf to run after its gradient is accumulated.

    Args:
        tensor: The leaf.

    Returns:
        A dict, or None.
    """
    return getattr(tensor, "_post_accumulate_grad_hooks", None)


def is_flat(parameter: Tensor) -> bool:
    """Whether a parameter is several ones, flattened by FullyShardedDataParallel.

    Args:
        parameter: The parameter.

    Returns:
        True if it is.
    """
    return bool(getattr(parameter, "_is_flat_param", False))


# -------------------------------------------------------------------------------------- modules and optimizers


def buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module, without those of its parts.

    Args:
        module: The module.

    Returns:
        Where it keeps them: what is written there is a buffer from then on.
    """
    return module._buffers


def optimizer_hooks(optimizer: object, moment: str) -> Any:
    """The table of an optimizer's hooks of one kind.

    Args:
        optimizer: The optimizer.
        moment: When they run, such as "step_post" or "load_state_dict_post".

    Returns:
        An ordered dict; None if there is no such table.
    """
    return getattr(optimizer, f"_optimizer_{moment}_hooks", None)


def hooks_of_base(moment: str) -> property:
    """A property of an optimizer that wraps another one: the other's table of hooks.

    Args:
        moment: As in :func:`optimizer_hooks`.

    Returns:
        The property. Torch looks for it by the name ``_optimizer_<moment>_hooks``.
    """
    name = f"_optimizer_{moment}_hooks"
    return property(lambda self: getattr(self.base, name))


# ---------------------------------------------------------------------------------------------------- profiler


def profiler_is_on() -> bool:
    """Whether a profiler of torch runs in this thread.

    Returns:
        True if one does.
    """
    return bool(torch._C._autograd._profiler_enabled())


# ------------------------------------------------------------------------------------------------ autograd's engine


def engine_backward(
    outputs: tuple[Any, ...], seeds: tuple[Tensor, ...], inputs: tuple[Tensor, ...], retain: bool, accumulate: bool
) -> tuple[Tensor | None, ...]:
    """A backward pass from seeds that fit their outputs: what is below the checks of ``torch.autograd``.

    On small networks the checks, of seeds above all, take as long as the pass. The public calls take their place in a
    version of torch that has no such function, and for tensor subclasses, which may handle the call themselves.

    Args:
        outputs: Where the pass starts.
        seeds: Gradients with respect to them, of their shapes, dtypes and devices.
        inputs: What to differentiate with respect to.
        retain: Keep the graph for another pass.
        accumulate: Write ``.grad`` instead.

    Returns:
        A gradient for each input, None where it is not reached; nothing where ``.grad`` was written.
    """
    if _ENGINE is not None and not has_torch_function((*outputs, *inputs)):
        found: tuple[Tensor | None, ...] = _ENGINE(outputs, seeds, retain, False, inputs, True, accumulate)
        return found or ()  # nothing comes back of what was accumulated
    if accumulate:
        torch.autograd.backward(outputs, seeds, retain_graph=retain, inputs=inputs)
        return ()
    return torch.autograd.grad(outputs, inputs, seeds, retain_graph=retain, allow_unused=True)


def _probed() -> Any:
    """The function below the checks, if it does here what it is called for."""
    engine = getattr(torch.autograd.graph, "_engine_run_backward", None)
    try:
        x, y = (torch.ones((), requires_grad=True) for _ in range(2))
        with torch.enable_grad():
            out = 2 * x
        one = torch.ones(())
        found = engine((out,), (one,), True, False, (x, y), True, False)  # type: ignore[misc]
        engine((out,), (one,), False, False, (x,), True, True)  # type: ignore[misc]
        works = len(found) == 2 and float(found[0]) == 2 and found[1] is None and float(x.grad) == 2  # type: ignore[arg-type]
    except Exception:  # whatever a version of torch does instead
        works = False
    return engine if works else None


_ENGINE = _probed()


# --------------------------------------------------------------------------------------------------- Lightning


def trainer_of(module: object) -> Any:
    """The trainer of a LightningModule. The public property raises an error where there is none.

    Args:
        module: The module.

    Returns:
        The trainer, or None.
    """
    return getattr(module, "_trainer", None)


def only_accumulates(trainer: Any) -> bool:
    """Lightning's own question: does no step follow on this micro-batch? On the last one of an epoch one always does.

    Args:
        trainer: The trainer.

    Returns:
        True if none does.
    """
    return bool(trainer.fit_loop._should_accumulate())

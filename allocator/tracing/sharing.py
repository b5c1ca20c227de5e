"""Weights that a copy shares with the caller's model: a forward that would write into them is stopped before that."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from allocator.modules import set_training, skeleton
from allocator.tracing.inputs import Inputs, device_of, dtype_of
from allocator.tracing.isolation import apart, undisturbed
from allocator.tracing.outputs import tensors_in

_WRITERS = frozenset({"__setitem__", "numpy", "data_ptr", "untyped_storage", "__array__", "__dlpack__"})
"""Beside functions whose names end so, those that write into a tensor, or give its memory to who may."""


class SharedWrite(BaseException):
    """A forward is about to write into weights that it shares; no `except Exception` of a model catches it."""


class Shared:
    """Weights that are not a copy's own, by the addresses of their memory."""

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        self.addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors if _is_plain(tensor)}

    def spare(self, function: Any, args: Any, kwargs: Any) -> None:
        """Raise `SharedWrite` where a function of torch's that is called so may write into them."""
        if not self.addresses or not _may_write(getattr(function, "__name__", ""), kwargs):
            return
        for tensor in tensors_in((args[:1], (kwargs or {}).get("out"))):
            if _is_plain(tensor) and address_of(tensor) in self.addresses:
                raise SharedWrite


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta


def address_of(tensor: torch.Tensor) -> int | None:
    """Where its memory lies; None of what stands for another tensor, as within `torch.func.grad`."""
    try:
        return torch.Tensor.untyped_storage(tensor).data_ptr()
    except NotImplementedError:
        return None


def _may_write(name: str, kwargs: Any) -> bool:
    in_place = name.endswith("_") and (not name.endswith("__") or name.startswith("__i"))
    return in_place or name in _WRITERS or bool(kwargs and "out" in kwargs)


class _Sparing(TorchFunctionMode):
    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.shared = shared

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.shared.spare(func, args, kwargs)
        return func(*args, **(kwargs or {}))


def writes_on_values(model: nn.Module, inputs: Inputs, known: Collection[str]) -> bool:
    """Whether an eval-mode forward on numbers writes into other weights than a trace on sizes says.

    Args:
        model: any module; not changed.
        inputs: of the forward; numbers are drawn.
        known: names of the tensors that it writes into as the trace has it.
    """
    shared: list[torch.Tensor] = []

    def share(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in known or not isinstance(tensor, nn.Parameter):
            return tensor.detach().clone()
        shared.append(tensor)
        return tensor.detach()

    copied = set_training(skeleton(model, share), False)
    given = inputs.noise(0, device_of(model), dtype_of(model))
    try:
        with torch.no_grad(), undisturbed(model), _Sparing(Shared(shared)):
            apart(copied, *given.args, **given.kwargs)
    except SharedWrite:
        return True
    except Exception:  # whatever the model's own code raises on noise
        return False
    return False

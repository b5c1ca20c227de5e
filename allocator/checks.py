"""What can be said about a model before it is traced."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .errors import UnsupportedModelError

_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")
_WRAPPERS = {
    "DataParallel": "pass model.module",
    "DistributedDataParallel": "pass model.module, and wrap the result again",
    "FullyShardedDataParallel": "allocate before sharding",
    "OptimizedModule": "pass the module that was compiled (model._orig_mod), and compile the result",
}


def check_model(model: object) -> nn.Module:
    """Return `model` if it can be traced as it is.

    Raises:
        UnsupportedModelError: not a module, or one that is wrapped, compiled, lazy, quantised or TorchScript;
            the message says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        hint = "pass exported_program.module()" if kind == "ExportedProgram" else "pass a torch.nn.Module"
        if isinstance(model, dict):
            hint = "this looks like a state_dict: build the model and load it first"
        raise UnsupportedModelError(f"a {kind} is not a torch.nn.Module: {hint}")
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{name} is TorchScript, which cannot be rewritten: pass the Python module it was made from"
        )
    if name in _WRAPPERS:
        raise UnsupportedModelError(f"the model is wrapped in {name}: {_WRAPPERS[name]}")
    for path, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTISED):
            raise UnsupportedModelError(
                f"{path or name} is quantised ({type(module).__name__}): allocate the float model, then quantise it"
            )
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise UnsupportedModelError(
                f"{path} is lazily initialised: run model(example_inputs) once, so that its shape is known"
            )
        if tensor.is_quantized:
            raise UnsupportedModelError(f"{path} is quantised: allocate the float model, then quantise it")
    return model

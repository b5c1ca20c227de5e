"""What can be said about a model without tracing it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from allocator import adapters
from allocator.errors import UnsupportedModelError, as_given
from allocator.modules import modules_of, tensor_names
from allocator.torch_private import FakeTensor

_QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")
_TRAINED_QUANTISED = (
    "torch.ao.nn.qat",
    "torch.nn.qat",
    "torch.ao.nn.intrinsic.qat",
    "torch.ao.quantization.fake_quant",
)
_FLOAT = frozenset({"FloatFunctional", "FXFloatFunctional"})  # stand among quantised modules, and add and join in float
_UNDO = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
_WRAPPERS = {
    "DataParallel": "its .module",
    "DistributedDataParallel": "its .module, and wrap the result again",
    "FullyShardedDataParallel": "the module before sharding",
    "FSDPModule": "the module before fully_shard",
    "OptimizedModule": "the module that was compiled (its ._orig_mod), and compile the result",
}


def check_model(model: object, *, values: bool = False, name: str = "the model") -> nn.Module:
    """Return `model`, or the network in a wrapper that an adapter knows, if it can be traced as it is.

    Args:
        model: what the caller gave.
        values: its parameters and buffers must have values, not only shapes.
        name: what messages call it.

    Raises:
        UnsupportedModelError: not a module, or one that is or holds one that is wrapped, compiled, lazy,
            quantised or TorchScript; the message says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{name} is of type {type(model).__name__}: {_instead_of(model)}")
    network = adapters.network_of(model)
    if not isinstance(network, nn.Module):
        raise UnsupportedModelError(
            f"this {type(model).__name__} holds no network but {network!r:.200}: pass one that holds the PyTorch model"
        )
    model = network
    modules = modules_of(model)
    first: dict[type, str] = {}
    for path, module in modules.items():
        first.setdefault(type(module), path or "the model")
    for cls, path in first.items():
        _check_class(cls, path)
    for path, tensor in tensor_names(model, modules).items():
        _check_tensor(tensor, path, values)
    return model


def _check_tensor(tensor: torch.Tensor, path: str, values: bool) -> None:
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        raise UnsupportedModelError(
            f"{path} is lazily initialised: run model(*example_inputs) once, so that its shape is known"
        )
    if tensor.is_quantized:
        raise UnsupportedModelError(f"{path} is quantised: allocate the float model, then quantise it")
    if isinstance(tensor, nn.Parameter) and (tensor.layout is not torch.strided or tensor.is_nested):
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise UnsupportedModelError(
            f"{path} is {kind}, which has no channels that could be followed: pass the model with dense weights, such "
            "as its .to_dense(), and make the result's sparse again"
        )
    if type(tensor).__name__ == "DTensor":
        raise UnsupportedModelError(
            f"{path} is a DTensor, spread over several processes: pass the model before it was sharded, or one "
            "whose parameters are their .full_tensor()"
        )
    if values and tensor.is_meta:
        raise UnsupportedModelError(
            f"{path} lies on the meta device and has no values: build the model on a real device and load "
            "its weights first"
        )
    if values and isinstance(tensor, FakeTensor):
        raise UnsupportedModelError(
            f"{path} is a fake tensor and has no values: build the model outside of FakeTensorMode"
        )


def without_reset(model: nn.Module) -> str:
    """Words for the modules with weights of their own that `weights="reset"` cannot reach; "" where there are none."""
    kept = []
    for path, module in model.named_modules():
        own = next(module.parameters(recurse=False), None)
        if own is not None and not callable(getattr(module, "reset_parameters", None)):
            kept.append(path or "the model itself")
    return f", but not those of {', '.join(kept)}, which have no reset_parameters()" if kept else ""


def undone_by(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The call that takes away what computes the weights of a module (weight norm, spectral norm); "" where none does.

    Args:
        path: of the module that was running.
        modules: the model's, by their paths.
    """
    owner, found, inside = path.rpartition("parametrizations")
    if found:
        owner, name = owner.rstrip("."), inside.strip(".").partition(".")[0]
        return f"torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule({owner!r}), {name!r})"
    for hook in modules[path]._forward_pre_hooks.values() if path in modules else ():
        undo = _UNDO.get(type(hook).__name__)
        if undo is not None and type(hook).__module__.startswith("torch."):
            return f"torch.nn.utils.{undo}(model.get_submodule({path!r}))"
    return ""


def _check_class(cls: type, where: str) -> None:
    kind = cls.__name__
    if issubclass(cls, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{where} is TorchScript ({kind}), which cannot be rewritten: pass the Python module it was made from"
        )
    for base in cls.__mro__:
        if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
            verb = "pass" if where == "the model" else "replace it by"
            raise UnsupportedModelError(f"{where} is wrapped in {base.__name__}: {verb} {_WRAPPERS[base.__name__]}")
    if cls.__module__.startswith(_TRAINED_QUANTISED):
        raise UnsupportedModelError(
            f"{where} is prepared for quantisation-aware training ({kind}): allocate the model as it was before "
            "prepare_qat, and prepare the result"
        )
    if cls.__module__.startswith(_QUANTISED) and kind not in _FLOAT:
        raise UnsupportedModelError(f"{where} is quantised ({kind}): allocate the float model, then quantise it")


def _instead_of(thing: object) -> str:
    if type(thing).__name__ == "ExportedProgram":
        return "pass exported_program.module()"
    if isinstance(thing, dict):
        return "this looks like a state_dict: build the model, load it, and pass the model"
    if isinstance(thing, str):
        name = as_given(thing)
        return f"pass a torch.nn.Module, such as allocator.build({name}) or allocator.load_model({name}) gives"
    if isinstance(thing, type) and issubclass(thing, nn.Module):
        return f"this is the class {thing.__name__}: pass an instance of it"
    return "pass a torch.nn.Module"

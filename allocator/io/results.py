"""Allocated models as data alone: tensors, allocation and the network's name in one ``.safetensors`` file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allocator import adapters
from allocator.arguments import checked
from allocator.disk import PathLike, existing, parse_json, shorten, write_atomically
from allocator.errors import (
    AllocationMismatchError,
    AllocatorError,
    FileError,
    InputError,
    NotSelfContainedWarning,
    a_kind,
    as_given,
    warn,
)
from allocator.io.models import BUILD_ATTRIBUTE, build_as_asked
from allocator.io.programs.program import Program
from allocator.io.rebuild import build_on_meta, build_quietly, build_spec, check_harmless, has_meta, no_larger_than
from allocator.io.safetensors_files import read_safetensors, write_safetensors
from allocator.modules import shapes_of, tensor_names
from allocator.recovering.record import Recovery, recovery_of, remember_recovery
from allocator.rewriting.allocation import Allocation, architecture_hash
from allocator.rewriting.lineage import led_to, remember
from allocator.rewriting.materialise import gives
from allocator.rewriting.rewrite import rewrite

RESULT_SUFFIX = ".safetensors"

_FORMAT = "neuron-allocator"
_FORMAT_VERSION = 2  # 1 had no flops, architecture, certificate and digest


@checked
def save_result(result: Any, path: PathLike) -> None:
    """Write an allocated model as data alone: tensors, allocation and the name it was built from, or its program.

    Args:
        result: what ``allocator.allocate`` returned; or a model that came out of an allocation, trained since or
            not; or a pair ``(model, allocation)``, where the allocation leads from a fresh build of the
            architecture to the model. After repeated allocation the first two know the whole way.
        path: ends in ``.safetensors``.

    Raises:
        FileError: wrong suffix, unwritable place, a model with state that is not a tensor, or one that no
            allocation is known of.
        AllocationMismatchError: the allocation does not lead from the named architecture to this model.
    """
    if Path(path).suffix != RESULT_SUFFIX:
        raise FileError(f"cannot save a result as {shorten(str(path), 200)}: the name must end in {RESULT_SUFFIX}")
    model, allocation, certificate = _parts(result)
    recorded = getattr(model, BUILD_ATTRIBUTE, None)
    _check_gives(model, allocation)
    if recorded is not None:
        _check_leads_to(model, recorded, allocation)
    tensors, aliases = _distinct_tensors(model.tensors() if isinstance(model, Program) else model.state_dict())
    flops = {"asked": allocation.flops_asked, "before": allocation.flops_before, "after": allocation.flops_after}
    metadata = {
        "format": _FORMAT,
        "format_version": str(_FORMAT_VERSION),
        "allocation": allocation.to_json(),
        "build": json.dumps(recorded),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "aliases": json.dumps(aliases),
        "training": json.dumps(model.training),
        "versions": json.dumps(_versions()),
        "flops": json.dumps(flops),
        "architecture": json.dumps(architecture_hash(shapes_of(model))),
        "certificate": json.dumps(certificate),
    }
    recovery = recovery_of(model)
    if recovery is not None:
        metadata["recovery"] = json.dumps(recovery.to_dict())
    if isinstance(model, Program):
        metadata["program"] = json.dumps(model.to_dict())
    metadata["digest"] = _digest(metadata, tensors)
    with write_atomically(path) as temporary:
        write_safetensors(tensors, temporary, metadata)
    needed = None if isinstance(model, Program) else _needed(model, recorded, path)
    if needed:
        warn(f"{path} does not hold the code of its network: {needed}", NotSelfContainedWarning)


def _needed(model: nn.Module, recorded: dict[str, Any] | None, path: PathLike) -> str | None:
    """What opening a saved result takes beside the file, None where nothing."""
    if recorded is None:
        cls = type(model)
        return (
            f"who opens it gives a fresh {cls.__module__}.{cls.__qualname__}, by --arch NAME (model=...); one that "
            "allocator.build('package.module:factory') makes before it is allocated is named in the file"
        )
    try:
        check_harmless(*build_spec(recorded, path), path)
    except FileError:
        return f"who opens it needs {recorded['name']}, and says --trust (trust=True) or gives a fresh one"
    return None


def _parts(result: Any) -> tuple[nn.Module, Allocation, dict[str, Any] | None]:
    """The model, the allocation that leads to it from a fresh build, and the certificate as data if there is one."""
    pair = (
        result if isinstance(result, tuple) else (getattr(result, "model", None), getattr(result, "allocation", None))
    )
    if len(pair) == 2 and isinstance(pair[1], Allocation):
        model, certificate = adapters.network_of(pair[0]), getattr(result, "certificate", None)
        led = None if isinstance(result, tuple) else led_to(model)
        return model, led or pair[1], None if certificate is None else certificate.to_dict()
    result = adapters.network_of(result)
    if not isinstance(result, nn.Module):
        raise InputError(
            f"result is {as_given(result)}, and takes what allocator.allocate gave, a model that came of it, or a pair "
            "(model, allocation)"
        )
    allocation = led_to(result)
    if allocation is None:
        raise FileError(
            f"no allocation is known that leads to this {type(result).__name__}: it was never allocated, or its "
            "tensors changed shape since. Pass (model, allocation), or save it as .pt with allocator.save_model"
        )
    return result, allocation, None


@checked
def load_result(
    path: PathLike, *, model: nn.Module | Callable[[], nn.Module] | None = None, trust: bool = False
) -> nn.Module:
    """Rebuild an allocated model from what `save_result` wrote.

    Args:
        path: a ``.safetensors`` file; or ``hf:folder`` for what ``save_pretrained`` of transformers wrote there.
        model: a fresh build of the original architecture, or a function that makes one; needed where the file
            neither names it nor holds it as a program. It is not changed. In a wrapper that an adapter knows, the
            result is in its like.
        trust: let the file name any ``package.module:factory`` to import and call.

    Returns:
        The allocated model with its weights, on the CPU.

    Raises:
        FileError: missing, damaged or changed, not a saved result, from a newer format, or ``model`` is needed.
        UnsafeFileError: the architecture the file names would be built by code outside the known libraries.
        AllocationMismatchError: ``model`` is not the architecture the allocation was made for.
    """
    if isinstance(path, str) and path.startswith("hf:") and model is None:
        return build_as_asked(path, {})
    metadata, tensors = _read_result(path)
    allocation = _allocation_of(metadata, path)
    _add_aliases(tensors, _parse(metadata, "aliases", path, dict), path)
    recorded = _parse(metadata, "build", path, (dict, type(None)))
    training = _parse(metadata, "training", path, bool)
    fresh = model if model is None or isinstance(model, nn.Module) else model()
    if fresh is not None:
        loaded = _fill(adapters.network_of(fresh), allocation, tensors, path)
    elif "program" in metadata:
        loaded = _program(_parse(metadata, "program", path, dict), allocation, tensors, path)
    elif recorded is None:
        raise FileError(
            f"{path} does not say how to build its network (a {metadata.get('class', 'model')}): give a "
            "fresh one with model=... (or --arch NAME)"
        )
    else:
        loaded = _rebuild(recorded, allocation, tensors, path, trust)
    if "architecture" in metadata:
        architecture = _parse(metadata, "architecture", path, str)
        if architecture != architecture_hash(shapes_of(loaded)):
            raise AllocationMismatchError(
                f"{path} was saved from a network with other tensors than the one it rebuilds"
            )
    if "recovery" in metadata:
        remember_recovery(loaded, Recovery.from_dict(_parse(metadata, "recovery", path, dict)))
    loaded.train(training)
    return loaded if fresh is None else adapters.wrapped_like(fresh, loaded)


def _add_aliases(tensors: dict[str, torch.Tensor], aliases: dict[str, Any], path: PathLike) -> None:
    """Put tied tensors under their other names too."""
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in tensors:
            raise FileError(f"{path} is damaged: {alias} stands for {name}, which is missing")
        tensors[alias] = tensors[name]


def _fill(fresh: nn.Module, allocation: Allocation, tensors: dict[str, torch.Tensor], path: PathLike) -> nn.Module:
    """Into a fresh build that the caller gave."""
    if isinstance(fresh, Program):  # its result holds the tensors too that a state_dict leaves out
        state = fresh.state_dict()
        tensors = {name: tensor for name, tensor in tensors.items() if name in state}
    return _assemble(fresh, allocation, tensors, path)


def _program(
    data: dict[str, Any], allocation: Allocation, tensors: dict[str, torch.Tensor], path: PathLike
) -> nn.Module:
    """The program that was saved as it was left: nothing has to be built."""
    try:
        program = Program.from_dict(data, tensors)
    except AllocatorError:
        raise
    except Exception as error:  # JSON of another shape than expected raises nearly anything
        raise FileError(f"{path} is damaged: its program cannot be read ({shorten(str(error), 200)})") from error
    _check_gives(program, allocation)
    if program.input_size is None and len(allocation.input_shapes) == 1:
        program.input_size = tuple(allocation.input_shapes[0][1:])
    remember(program, program, allocation)
    return program


def load_result_allocation(path: PathLike) -> Allocation:
    """The allocation inside a saved result."""
    return _allocation_of(_read_result(path)[0], path)


def _rebuild(
    recorded: dict[str, Any],
    allocation: Allocation,
    tensors: dict[str, torch.Tensor],
    path: PathLike,
    trust: bool,
) -> nn.Module:
    """From the recorded build, without arithmetic on the meta device where the network can live there."""
    name, kwargs = build_spec(recorded, path)
    if trust:
        return _assemble_named(name, kwargs, allocation, tensors, path)
    check_harmless(name, kwargs, path)
    try:
        with no_larger_than(tensors, path):
            return _assemble_named(name, kwargs, allocation, tensors, path)
    except AllocatorError:
        raise
    except Exception as error:  # arguments that the constructor cannot make anything of
        raise FileError(f"{path} is damaged: {name} cannot be built from it ({shorten(str(error), 200)})") from error


def _assemble_named(
    name: str, kwargs: dict[str, Any], allocation: Allocation, tensors: dict[str, torch.Tensor], path: PathLike
) -> nn.Module:
    meta = build_on_meta(name, kwargs)
    if meta is not None:
        loaded = _assemble(meta, allocation, tensors, path)
        if not has_meta(loaded):
            return loaded
    return _assemble(build_quietly(name, kwargs), allocation, tensors, path)


def _assemble(fresh: nn.Module, allocation: Allocation, tensors: dict[str, torch.Tensor], path: PathLike) -> nn.Module:
    """Apply the allocation to a fresh build and put the tensors in."""
    small = rewrite(fresh, allocation)
    held: dict[int, torch.Tensor] = {}  # one parameter per stored tensor, so that tied weights stay tied
    state: dict[str, torch.Tensor] = {}
    parameters = dict(small.named_parameters(remove_duplicate=False))
    for key, value in tensors.items():
        if key in parameters:
            flag = parameters[key].requires_grad
            state[key] = held.setdefault(id(value), nn.Parameter(value, requires_grad=flag))
        else:
            state[key] = value
    try:
        _put_in_place(small, state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise FileError(f"the weights in {path} do not fit its network: {shorten(str(error))}") from error
    return small


def _put_in_place(small: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """By the network's own `load_state_dict`, unless that is from before there was `assign`."""
    taken = inspect.signature(small.load_state_dict).parameters.values()
    able = any(p.name == "assign" or p.kind is p.VAR_KEYWORD for p in taken)
    (small.load_state_dict if able else partial(nn.Module.load_state_dict, small))(state, assign=True)


def _check_gives(model: nn.Module, allocation: Allocation) -> None:
    """The tensors that the allocation cuts must have the sizes that it leaves."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensor_names(model).items()}
    if not gives(allocation, shapes):
        raise AllocationMismatchError(
            f"this {type(model).__name__} is not what the allocation leads to: its tensors have other sizes. Give "
            "the model that was allocated, and for repeated allocation first.compose(second)"
        )


def _check_leads_to(model: nn.Module, recorded: dict[str, Any], allocation: Allocation) -> None:
    """The allocation, applied to the recorded build, must give tensors of the model's shapes."""
    fresh = build_on_meta(recorded["name"], recorded["kwargs"])
    if fresh is None:
        fresh = build_quietly(recorded["name"], recorded["kwargs"])
    expected = {key: tuple(value.shape) for key, value in rewrite(fresh, allocation).state_dict().items()}
    for key, value in model.state_dict().items():
        if expected.get(key) != tuple(value.shape):
            raise AllocationMismatchError(
                f"the allocation does not lead from a fresh {recorded['name']} to this model: {key} has "
                f"shape {tuple(value.shape)}, expected {expected.get(key)}. Undo what was changed in the model "
                f"since it was built, or delete its attribute {BUILD_ATTRIBUTE} and load with model=..."
            )


def _distinct_tensors(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A state_dict with each stored tensor once, and the other names of tied ones."""
    seen: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise FileError(f"cannot save {name}: it is {a_kind(value)}, not a tensor; use .pt")
        identity = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride())
        if value.numel() and identity in seen:
            aliases[name] = seen[identity]
            continue
        seen[identity] = name
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    return tensors, aliases


def is_result(metadata: dict[str, str]) -> bool:
    """Whether `save_result` wrote a file with this metadata."""
    return metadata.get("format") == _FORMAT


def _read_result(path: PathLike) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a saved result, checked against its digest."""
    file = existing(path)
    if file.suffix != RESULT_SUFFIX:
        raise FileError(f"{file} is not a saved result: the name must end in {RESULT_SUFFIX}")
    metadata, tensors = read_safetensors(file)
    if not is_result(metadata):
        raise FileError(
            f"{file} holds weights that this package did not save: say which network they belong to with "
            "--arch NAME (allocator.load_model(path, arch=...))"
        )
    version = metadata.get("format_version", "")
    if version not in map(str, range(1, _FORMAT_VERSION + 1)):
        raise FileError(
            f"{file} has format version {version!r:.40}, and this release reads 1 to {_FORMAT_VERSION}: "
            f"pip install --upgrade neuron-allocator{_writer(metadata)}"
        )
    if version != "1" and metadata.get("digest") != _digest(metadata, tensors):
        raise FileError(f"{file} is damaged, or was changed after it was saved: its digest does not fit its content")
    return metadata, tensors


def _writer(metadata: dict[str, str]) -> str:
    """Words for the release that wrote the file, where it says so."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        return f" (it was written by release {parse_json(metadata['versions'])['neuron-allocator']!s:.40})"
    return ""


def _digest(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over all metadata but the digest itself, and over every tensor's name, type, shape and bytes."""
    said = sorted((key, value) for key, value in metadata.items() if key != "digest")
    digest = hashlib.sha256(json.dumps(said).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(flat)
    return digest.hexdigest()


def _allocation_of(metadata: dict[str, str], path: PathLike) -> Allocation:
    try:
        return Allocation.from_json(metadata.get("allocation", ""))
    except FileError as error:
        raise FileError(f"{path} is damaged: its allocation cannot be read ({error})") from error


def _parse(metadata: dict[str, str], key: str, path: PathLike, kind: type | tuple[type, ...]) -> Any:
    try:
        value = parse_json(metadata[key])
    except (KeyError, ValueError) as error:
        raise FileError(f"{path} is damaged: its {key} cannot be read") from error
    if not isinstance(value, kind):
        raise FileError(f"{path} is damaged: its {key} is {a_kind(value)}")
    return value


def _versions() -> dict[str, str]:
    names = ("neuron-allocator", "torch", "torchvision", "timm")
    found: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found

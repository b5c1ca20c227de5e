"""The network that a file names, built without letting the file run, fetch or take more than its weights need.

A saved result names its network and the arguments it was built with. Both are as suspect as the file: a name may be
that of any function, an argument may fetch something, and a number may ask for more memory than there is.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from allocator.disk import PathLike
from allocator.errors import FileError, UnsafeFileError
from allocator.io.models import build

_SAFE_PREFIXES = ("torchvision:", "timm:", "recipe:")
# Arguments that would fetch or open something else than the file at hand.
_UNSAFE_KWARGS = ("pretrained", "weights", "checkpoint", "cache_dir", "file", "url")
_LARGEST_ARGUMENT = 2**17
"""Of a build that a file asks for: more than any width or number of classes."""

# What a whole network may have for what its allocation left. Budgets are seldom under a hundredth of the network.
_LAYERS_PER_TENSOR, _FREE_LAYERS = 8, 2_000
_NUMBERS_PER_NUMBER, _FREE_NUMBERS = 1_000, 2**26


def build_spec(recorded: dict[str, Any], path: PathLike) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a recorded build.

    Raises:
        FileError: it is none.
    """
    name, kwargs = recorded.get("name"), recorded.get("kwargs")
    if not isinstance(name, str) or not isinstance(kwargs, dict):
        raise FileError(f"{path} is damaged: its build cannot be read")
    return name, kwargs


def check_harmless(name: str, kwargs: dict[str, Any], path: PathLike) -> None:
    """A file may name a network of a known library; it may not name code to import, or things to fetch.

    Raises:
        UnsafeFileError: it does.
        FileError: a number among the arguments is larger than any network needs.
    """
    prefix, _, model = name.partition(":")
    # timm takes "hf-hub:..." and "local-dir:..." for names too: a second colon or a slash is refused.
    if f"{prefix}:" not in _SAFE_PREFIXES or re.fullmatch(r"[\w.-]+", model) is None:
        raise UnsafeFileError(_could_run(repr(name), path))
    for key in kwargs:
        if key != "init_weights" and any(unsafe in key for unsafe in _UNSAFE_KWARGS):
            raise UnsafeFileError(_could_run(f"the argument {key!r} of {name!r}", path))
    if any(abs(number) > _LARGEST_ARGUMENT for number in _numbers(kwargs)):
        raise FileError(f"{path} is damaged: it asks for {name} with arguments beyond {_LARGEST_ARGUMENT:,}")


def _could_run(what: str, path: PathLike) -> str:
    return (
        f"{path} asks to build its network from {what}, which could run or fetch something else. Give a "
        "fresh network with model=... (or --arch NAME), or pass --trust (trust=True) if you trust the file"
    )


def _numbers(arguments: dict[str, Any]) -> Iterator[float]:
    """All numbers in plain data that may be sizes; figures such as an allocation's FLOPs are none."""
    waiting: list[Any] = [arguments]  # a list and no recursion: a file may nest them as deep as it likes
    while waiting:
        value = waiting.pop()
        if isinstance(value, (int, float)):
            yield value
        elif isinstance(value, dict):
            waiting += [item for key, item in value.items() if not key.startswith("flops")]
        elif isinstance(value, list):
            waiting += value


def build_on_meta(name: str, kwargs: dict[str, Any]) -> nn.Module | None:
    """The network without storage, or None where its constructor needs values."""
    try:
        with torch.device("meta"):
            return build(name, **kwargs)
    except (NotImplementedError, RuntimeError):  # a copy out of meta tensors, .item() on one
        return None


def build_quietly(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The network with random weights, the caller's random numbers left as they are."""
    with torch.random.fork_rng(devices=[]):
        return build(name, **kwargs)


def has_meta(model: nn.Module) -> bool:
    """Whether a tensor without values is left: a buffer that is not saved, or a plain attribute."""
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        if any(isinstance(value, torch.Tensor) and value.is_meta for value in held):
            return True
    return False


@contextlib.contextmanager
def no_larger_than(tensors: Mapping[str, torch.Tensor], path: PathLike) -> Iterator[None]:
    """Stop a build that makes far more layers, or far larger ones, than the file has tensors for.

    Raises:
        FileError: it does; before the parameter that is too much is filled with values.
    """
    layers = _LAYERS_PER_TENSOR * len(tensors) + _FREE_LAYERS
    held = sum(tensor.numel() for tensor in tensors.values())
    numbers = _NUMBERS_PER_NUMBER * held + _FREE_NUMBERS

    def count(_module: nn.Module, _name: str, parameter: Any) -> None:
        nonlocal layers, numbers
        layers -= 1
        if layers < 0:
            raise FileError(f"{path} is damaged: its {len(tensors)} tensors are far too few for the network it names")
        if isinstance(parameter, torch.Tensor) and not parameter.is_meta:  # without storage it costs nothing
            numbers -= parameter.numel()
        if numbers < 0:
            raise FileError(f"{path} is damaged: its {held:,} numbers are far too few for the network it names")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()

"""Opening the model that an argument names, and what it is fed."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import UsageError
from allocator.cli.talk import Talk
from allocator.disk import existing
from allocator.errors import FileError
from allocator.settings import PREFIXES

if TYPE_CHECKING:
    from torch import nn

    from allocator.cost.latency import Latency
    from allocator.rewriting.allocation import Allocation


def open_model(spec: str, args: argparse.Namespace, talk: Talk) -> nn.Module:
    """The model a MODEL argument stands for: a file if there is one of that name, else a named network."""
    find_local_modules(args, spec, args.arch)
    if os.path.exists(spec) or not _is_name(spec):
        return _model_in_file(spec, args, talk)
    return _named_model(spec, args, talk)


def find_local_modules(args: argparse.Namespace, *names: str | None) -> None:
    """Let modules of the folder we are in be found, where --trust or a function's name says that they are meant."""
    if (args.trust or any(_is_factory(name) for name in names if name)) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _is_factory(name: str) -> bool:
    return _is_name(name) and name.partition(":")[0] not in PREFIXES and not os.path.exists(name)


def _is_name(spec: str) -> bool:
    prefix, colon, name = spec.partition(":")
    return bool(colon and name) and all(part.isidentifier() for part in prefix.split("."))


def _model_in_file(path: str, args: argparse.Namespace, talk: Talk) -> nn.Module:
    if args.set and not args.arch:
        raise UsageError("--set goes with a named model or with --arch NAME, not with a file alone")
    try:
        existing(path)  # said before torch is loaded, which takes seconds
    except FileError as error:
        # "resnet18" alone is more likely meant as a network's name than as a file's.
        if os.path.exists(path) or os.sep in path or "." in path:
            raise
        own = f"{path}:FUNCTION" if os.path.isfile(f"{path}.py") else f"torchvision:{path}"
        raise FileError(f"{error}; a named model has a prefix, as in {own}") from error
    from allocator.io.files import load_model

    with talk.stage(f"reading {path}"):
        return load_model(path, arch=args.arch, trust=args.trust, arch_kwargs=dict(args.set))


def _named_model(name: str, args: argparse.Namespace, talk: Talk) -> nn.Module:
    if args.arch:
        raise UsageError("--arch goes with a file of weights, not with a named model")
    import torch

    from allocator.io.models import build_as_asked

    torch.manual_seed(0)  # a name stands for the same weights every time, so that verify can build it again
    with talk.stage(f"building {name}"):
        return build_as_asked(name, dict(args.set))


def example_inputs(args: argparse.Namespace, model: nn.Module, allocation: Allocation | None = None) -> Any:
    """Inputs of the sizes asked for, else of those an allocation was made with, else None."""
    sizes = args.input_size
    if not sizes and allocation is not None:
        sizes = allocation.input_shapes
    if not sizes:
        return None
    from allocator.tracing.inputs import inputs_of_sizes

    return inputs_of_sizes(sizes, model)


def measured(model: nn.Module, name: str, inputs: Any, args: argparse.Namespace, talk: Talk) -> Latency | None:
    """The latency of a model, where it is asked for."""
    if not args.latency:
        if args.threads is not None:
            raise UsageError("--threads goes with --latency")
        return None
    from allocator.cost.latency import latency

    with talk.stage(f"measuring {name}"):
        return latency(model, inputs, threads=args.threads)

"""Opening the model that an argument names, and what it is fed."""

# Packages that take long to import are imported where they are used, so that --help answers at once.

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import UsageError
from allocator.cli.talk import Talk

if TYPE_CHECKING:
    import torch
    from torch import nn

    from allocator.cost.latency import Latency
    from allocator.rewriting.allocation import Allocation


def open_model(spec: str, args: argparse.Namespace, talk: Talk) -> nn.Module:
    """The model a MODEL argument stands for: a file if there is one of that name, else a named network."""
    from allocator.errors import FileError
    from allocator.io.files import load_model
    from allocator.io.models import build

    if os.path.exists(spec) or not _is_name(spec):
        if args.set:
            raise UsageError("--set goes with a named model, not with a file")
        try:
            with talk.stage(f"reading {spec}"):
                return load_model(spec, arch=args.arch, trust=args.trust)
        except FileError as error:
            if os.path.exists(spec) or os.sep in spec or "." in spec:
                raise
            raise FileError(f"{error}; a named model has a prefix, as in torchvision:{spec}") from error
    if args.arch:
        raise UsageError("--arch goes with a file of weights, not with a named model")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that package.module:factory finds the user's own code
    import torch

    torch.manual_seed(0)  # a name stands for the same weights every time, so that verify can build it again
    with talk.stage(f"building {spec}"):
        return build(spec, **dict(args.set))


def _is_name(spec: str) -> bool:
    prefix, colon, rest = spec.partition(":")
    return bool(colon and rest) and all(part.isidentifier() for part in prefix.split("."))


def example_inputs(args: argparse.Namespace, allocation: Allocation | None = None) -> tuple[torch.Tensor, ...] | None:
    """Random inputs of the sizes asked for, else of those an allocation was made with, else None."""
    sizes = args.input_size or (allocation.input_shapes if allocation is not None else None)
    if not sizes:
        return None
    import torch

    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(tuple(size), generator=generator) for size in sizes)


def measured(model: nn.Module, name: str, inputs: Any, args: argparse.Namespace, talk: Talk) -> Latency | None:
    """The latency of a model, where it is asked for."""
    if not args.latency:
        if args.threads is not None:
            raise UsageError("--threads goes with --latency")
        return None
    from allocator.cost.latency import latency

    with talk.stage(f"measuring {name}"):
        return latency(model, inputs, threads=args.threads)

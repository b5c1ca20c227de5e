"""Example inputs: given by the caller, or inferred from the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from allocator import adapters
from allocator.errors import InputError
from allocator.torch_private import tree_flatten, tree_map

MOST_NUMBERS = 2**31
"""Of one input: 8 GiB of float32. What a file says of its network's inputs may be anything."""
_SIDES = {1: (4096,), 2: (224, 224), 3: (16, 112, 112)}


@dataclass(frozen=True)
class Inputs:
    """Arguments for one forward.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        assumed: how they were inferred, or None where the caller gave them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    assumed: str | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All tensors among the arguments, in order."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, torch.Tensor)]

    def describe(self) -> str:
        """Shapes and dtypes in words, for messages."""
        shapes = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in self.tensors()]
        return "inputs of " + (", ".join(shapes) or "no tensors")

    def sizes(self) -> str:
        """The shapes of all tensors, as `1x3x224x224`."""
        return " and ".join("x".join(map(str, t.shape)) or "()" for t in self.tensors())

    def batch(self, times: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with every tensor's first dim repeated `times` times."""

        def repeat(leaf: Any) -> Any:
            if times == 1 or not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
                return leaf
            return torch.cat([leaf] * times)

        return tree_map(repeat, (self.args, self.kwargs))

    def map(self, function: Any) -> Inputs:
        """The same inputs with `function` applied to every tensor."""
        args, kwargs = tree_map(
            lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, (self.args, self.kwargs)
        )
        return Inputs(args, kwargs, self.assumed)

    def own(self) -> Inputs:
        """The same in memory of its own, since a forward may write into what it is given."""
        return self.map(lambda tensor: tensor.detach().clone())

    def noise(
        self, seed: int, device: torch.device, dtype: torch.dtype, *, positive: bool = False, scale: float = 1.0
    ) -> Inputs:
        """Standard normal values in place of the floating-point tensors, drawn on the CPU for any device.

        Args:
            seed, device, dtype: of what is drawn.
            positive: from 0.1 to 1 evenly instead, as logarithms and roots take.
            scale: what they are multiplied by.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(t: torch.Tensor) -> torch.Tensor:
            if not t.is_floating_point():
                return t.to(device)
            options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
            if positive:
                return torch.rand(t.shape, **options).mul_(0.9).add_(0.1).mul_(scale).to(device, dtype)
            return torch.randn(t.shape, **options).mul_(scale).to(device, dtype)

        return self.map(draw)


def as_inputs(example_inputs: Any, model: nn.Module) -> Inputs:
    """Read what the caller passed as `example_inputs`.

    Args:
        example_inputs: a tensor; a tuple of positional arguments; a dict of keyword arguments; or None to
            infer one image from the model.
        model: the model they are for.

    Raises:
        InputError: they can't be inferred, hold no or empty tensors, or lie on another device than the model.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if example_inputs is None:
        return infer_inputs(model)
    if isinstance(example_inputs, tuple):
        inputs = Inputs(example_inputs)
    elif isinstance(example_inputs, Mapping):  # what a tokenizer gives is no dict
        inputs = Inputs((), dict(example_inputs))
    else:
        inputs = Inputs((example_inputs,))
    _check_tensors(inputs)
    _check_device(inputs, model)
    return inputs


def _check_tensors(inputs: Inputs) -> None:
    given = (*inputs.args, *inputs.kwargs.values())
    if given and all(type(item) is int for item in given):
        size = ", ".join(map(str, given))
        raise InputError(f"example_inputs are plain numbers, not tensors: pass torch.zeros({size})")
    if given and not inputs.tensors():
        kinds = ", ".join(type(item).__name__ for item in given)
        raise InputError(
            f"example_inputs hold no tensor, only {kinds}: pass a tensor, a tuple of arguments, or a dict of "
            "keyword arguments, for example torch.zeros(1, 3, 224, 224)"
        )
    if given and all(tensor.numel() == 0 for tensor in inputs.tensors()):
        raise InputError(f"example_inputs are empty ({inputs.describe()}): pass a batch of 1")


def _check_device(inputs: Inputs, model: nn.Module) -> None:
    device = device_of(model)
    for tensor in inputs.tensors():
        if tensor.device != device and device.type != "meta":
            raise InputError(
                f"example_inputs lie on {tensor.device}, the model on {device}: "
                f"move one of them, for example example_inputs.to('{device}')"
                if not tensor.is_meta
                else f"example_inputs lie on meta, the model on {device}: make them there, for example "
                f"torch.zeros({tuple(tensor.shape)}, device='{device}')"
            )


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; the CPU where it has none."""
    for tensor in chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """Dtype of the model's first floating-point parameter; float32 where it has none."""
    for tensor in model.parameters():
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def infer_inputs(model: nn.Module) -> Inputs:
    """One batch of one image whose size comes from the model itself.

    The adapter of its class is asked first, then an `input_size` attribute; failing these, the first
    convolution's channels at 224x224 (2-D), 16x112x112 (3-D) or 4096 samples (1-D), or the first linear
    layer's features.

    Raises:
        InputError: nothing in the model tells.
    """
    known: tuple[adapters.Arguments, str] | None = adapters.example_inputs(model)
    if known is None:
        shape, source = _input_shape(model)
        _check_size((1, *shape), source)
        known = (torch.zeros(1, *shape),), source
    inputs = Inputs((), known[0]) if isinstance(known[0], dict) else Inputs(known[0])
    inputs = inputs.map(lambda t: t.to(device_of(model), dtype_of(model) if t.is_floating_point() else t.dtype))
    return Inputs(inputs.args, inputs.kwargs, f"input {inputs.sizes()}, from {known[1]}")


def inputs_of_sizes(sizes: Sequence[Sequence[int]], model: nn.Module) -> tuple[torch.Tensor, ...] | dict[str, Any]:
    """Arguments of these sizes, the same every time; of the kinds and by the names that the model's adapter says.

    Args:
        sizes: of the first arguments or of all; those that follow are as large as the adapter has them.
        model: the model they are for.

    Returns:
        Standard normal tensors of the model's dtype on the CPU, and ids that the model knows in place of whole numbers;
        a tuple, or a dict where the model takes its arguments by name.
    """
    generator = torch.Generator().manual_seed(0)
    known = adapters.example_inputs(model)
    for size in sizes:
        _check_size(size, "what is asked for")
    usual = [] if known is None else list(known[0].values() if isinstance(known[0], dict) else known[0])
    given = [torch.randn(tuple(size), generator=generator).to(dtype_of(model)) for size in sizes]
    if known is None or len(sizes) > len(usual):
        return tuple(given)
    for i, (size, pattern) in enumerate(zip(sizes, usual)):
        if not pattern.is_floating_point():
            count = int(torch.Size(size).numel())
            given[i] = (torch.arange(count) % (int(pattern.max()) + 1)).reshape(tuple(size)).to(pattern.dtype)
    arguments = [*given, *usual[len(given) :]]
    return dict(zip(known[0], arguments)) if isinstance(known[0], dict) else tuple(arguments)


def _check_size(size: Sequence[int], source: str) -> None:
    if math.prod(size) > MOST_NUMBERS:
        said = "x".join(map(str, size))
        raise InputError(
            f"an input of {said:.80}, from {source}, has more than {MOST_NUMBERS:,} numbers: pass example_inputs, for "
            "example example_inputs=torch.zeros(1, 3, 224, 224), or in a shell --input-size 1x3x224x224"
        )


def is_size_known(model: nn.Module) -> bool:
    """Whether the model itself says how large its inputs are, so that `infer_inputs` need not take the usual size."""
    return _own_size(model) is not None or adapters.example_inputs(model) is not None


def inputs_like(shapes: Sequence[Sequence[int]], model: nn.Module) -> torch.Tensor | None:
    """A tensor of zeros of the one shape there is; None where there are several, or where it is not an image's."""
    if len(shapes) != 1 or len(shapes[0]) < 3:
        return None
    _check_size(shapes[0], "the allocation")
    return torch.zeros(tuple(shapes[0]), dtype=dtype_of(model), device=device_of(model))


def _own_size(model: nn.Module) -> tuple[int, ...] | None:
    size = getattr(model, "input_size", None)
    return tuple(size) if isinstance(size, (tuple, list)) and size and all(isinstance(n, int) for n in size) else None


def _input_shape(model: nn.Module) -> tuple[tuple[int, ...], str]:
    size = _own_size(model)
    if size is not None:
        return size, "the model's input_size"
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            rank = len(module.kernel_size)
            return (module.in_channels, *_SIDES[rank]), "the first convolution and the field's usual size"
        if isinstance(module, nn.Linear):
            return (module.in_features,), "the first linear layer"
        if isinstance(module, nn.Embedding):
            break
    raise InputError(
        f"no input size can be inferred from {type(model).__name__}: "
        "pass example_inputs, for example example_inputs=torch.zeros(1, 3, 224, 224), or in a shell "
        "--input-size 1x3x224x224"
    )

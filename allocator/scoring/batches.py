"""Batches of the caller's data as arguments for the model, whatever kind of loader they come from."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from allocator.errors import DataError, a_kind, text_of
from allocator.torch_private import tree_flatten, tree_map
from allocator.tracing.inputs import Inputs, device_of, dtype_of
from allocator.tracing.isolation import apart

_IMAGES = ("img", "image", "images", "pixel_values", "input", "inputs", "x")
"""Names under which batches that are dicts hold what a forward of one positional argument takes."""


@dataclass(frozen=True)
class Batch:
    """Arguments for one forward, and what came with them.

    Attributes:
        inputs: what the model takes.
        target: the rest of the batch (labels), or None.
    """

    inputs: Inputs
    target: Any = None

    @property
    def size(self) -> int:
        """How many samples it holds."""
        return max((t.shape[0] for t in self.inputs.tensors() if t.dim()), default=1)

    @property
    def parts(self) -> bool:
        """Whether what came with the samples is known to be one entry for each, so that it goes with them."""
        if isinstance(self.target, (list, tuple)) and len(self.target) == self.size:
            return False  # one of its items for each, as of a detector, whose tensors are of any length
        leaves, _ = tree_flatten(self.target)
        return all(leaf is None or (_has_samples(leaf) and leaf.shape[0] == self.size) for leaf in leaves)

    def chunks(self, size: int) -> Iterator[Batch]:
        """Parts of at most so many samples, in order; itself where it does not part."""
        if not self.parts:
            yield self
            return
        whole = self.size
        for start in range(0, whole, size):

            def part(leaf: Any, start: int = start) -> Any:
                return leaf[start : start + size] if _has_samples(leaf) and leaf.shape[0] == whole else leaf

            args, kwargs = tree_map(part, (self.inputs.args, self.inputs.kwargs))
            yield Batch(Inputs(args, kwargs), tree_map(part, self.target))


def _has_samples(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.dim() > 0


def batches(data: Any, model: nn.Module, example: Inputs) -> Iterator[Batch]:
    """What a loader yields, as arguments for the model, on its device and in its dtype.

    Args:
        data: a tensor of inputs, a dict of them by name; or an iterable of tensors, of tuples of arguments, of
            (inputs, target) pairs, or of dicts, as torch's, Hugging Face's and Ultralytics' loaders give them; or of
            batches that this gave.
        model: what they are for.
        example: the inputs that it was traced with, which tell how many arguments it takes.

    Raises:
        DataError: the loader is empty, or yields what the model does not take.
    """
    if isinstance(data, (torch.Tensor, Mapping)):
        data = (data,)
    if not isinstance(data, Iterable) or isinstance(data, str):
        raise DataError(f"data is {a_kind(data)}: pass a loader, or a tensor of inputs")
    device, dtype = device_of(model), dtype_of(model)

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.is_meta:
            raise DataError("the data lie on the meta device and have no values")
        leaf = leaf.clone() if leaf.is_inference() else leaf  # which no gradient may be taken through
        return leaf.to(device, dtype) if leaf.is_floating_point() else leaf.to(device)

    empty = True
    for item in data:
        batch = _as_batch(item, model, example)
        if not batch.inputs.tensors():
            raise DataError(f"the data yield {a_kind(item)} without a tensor for the model")
        if _is_one_sample(batch.inputs, example):
            had, wanted = batch.inputs.describe(), example.sizes()
            raise DataError(f"the data yield {had}, and the model was traced with {wanted}; {NO_BATCH}")
        if batch.size:
            empty = False
            yield Batch(batch.inputs.map(place), tree_map(place, batch.target))
    if empty:
        raise DataError("the data are empty: the loader yields no batch, or none with a sample")


NO_BATCH = (
    "a sample alone needs a batch dim: yield batches, as torch.utils.data.DataLoader makes of a data set, or "
    "sample[None] for a batch of one"
)


def _is_one_sample(inputs: Inputs, example: Inputs) -> bool:
    """Whether every tensor lacks the first dim that the example's has, and has the second's size."""
    pairs = list(zip(inputs.tensors(), example.tensors(), strict=False))
    return all(t.dim() == e.dim() - 1 and t.dim() > 0 and t.shape[0] == e.shape[1] for t, e in pairs)


def outputs_of(model: nn.Module, inputs: Inputs) -> Any:
    """What the model gives; the inputs stay as they are.

    Raises:
        DataError: it raised.
    """
    given = inputs.own()
    try:
        return apart(model, *given.args, **given.kwargs)
    except Exception as error:
        said = f"the model raised {type(error).__name__} on {inputs.describe()} from the data: {text_of(error):.300}"
        raise DataError(said) from error


def first_sample(data: Any, model: nn.Module) -> Inputs | None:
    """One sample of the data as inputs to trace a model with.

    Args:
        data: as for `batches`; only what can be gone through more than once is looked at.
        model: what they are for.

    Returns:
        None where it takes more to know which part of a batch is for the model: where it is no tensor, nor a pair whose
        first part is one for a forward that needs one argument, nor a dict with one such argument.
    """
    if not isinstance(data, (torch.Tensor, Mapping)):
        if isinstance(data, Iterator) or not isinstance(data, Iterable):
            return None
        data = next(iter(data), None)
    if isinstance(data, Mapping) and _needs_one(model):
        with contextlib.suppress(DataError):
            data = _of_dict(data, model, Inputs(()))
    if isinstance(data, Batch):
        (data, *more) = (*data.inputs.args, *data.inputs.kwargs.values())
        data = None if more else data
    elif isinstance(data, (tuple, list)) and data and _needs_one(model):
        data = data[0]
    if not isinstance(data, torch.Tensor) or not data.dim() or not data.is_floating_point() or not data.numel():
        return None
    sample = data[:1].detach().to(device_of(model), dtype_of(model))
    return Inputs((sample,), {}, f"input {'x'.join(map(str, sample.shape))}, from the first of the data")


def _needs_one(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 1


def again_and_again(data: Any) -> Any:
    """The same data, that can be gone through more than once: what an iterator gives is put into a list."""
    return list(data) if isinstance(data, Iterator) else data


def _as_batch(item: Any, model: nn.Module, example: Inputs) -> Batch:
    if isinstance(item, Batch):
        return item
    if isinstance(item, torch.Tensor):
        return Batch(Inputs((item,)))
    if isinstance(item, Mapping):
        return _of_dict(item, model, example)
    if isinstance(item, (tuple, list)) and item:
        expected = len(example.args)
        if len(item) == expected and expected > 1:
            return Batch(Inputs(tuple(item)))
        first, *rest = item
        target = rest[0] if len(rest) == 1 else tuple(rest) or None
        if isinstance(first, Mapping):
            return Batch(_of_dict(first, model, example).inputs, target)
        return Batch(Inputs(tuple(first) if isinstance(first, (tuple, list)) else (first,)), target)
    as_tensor = "; torch.from_numpy makes a tensor of it" if type(item).__module__ == "numpy" else ""
    raise DataError(
        f"the data yield {a_kind(item)}: expected tensors, tuples of arguments, (inputs, target) pairs or "
        f"dicts{as_tensor}"
    )


def _of_dict(item: Mapping[str, Any], model: nn.Module, example: Inputs) -> Batch:
    """By the names of the forward's arguments; where it has none of them, by the usual name of images."""
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    taken = example.kwargs.keys() or [
        name for name in item if (name in parameters or open_ended) and name not in ("labels", "label")
    ]
    kwargs = {name: item[name] for name in taken if name in item}
    if kwargs:
        return Batch(Inputs((), kwargs), dict(item))
    for name in _IMAGES:
        if isinstance(item.get(name), torch.Tensor):
            return Batch(Inputs((item[name],)), dict(item))
    names = ", ".join(map(str, item))
    raise DataError(f"the data yield dicts of {names}, none of which {type(model).__name__}.forward takes by name")

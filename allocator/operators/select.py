"""Operators that take a part: split, chunk, slice, select, indexing, padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from allocator.flow.flow import Flow
from allocator.flow.labels import FROZEN, Label
from allocator.operators.pointwise import adopt
from allocator.tracing.calls import Op, Trace
from allocator.tracing.operators import AS_ONE_CALL, Declaration, declare, operator
from allocator.tracing.value_sized import MASKS, everywhere, without_values


@operator(
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "split_copy",
    "split_with_sizes_copy",
    sized=True,
    splits=True,
    stands_for="split",
)
def split(flow: Flow, op: Op) -> None:
    """Consecutive parts. Where the module's attributes give the sizes, each part is free to shrink."""
    source = op.inputs()[0]
    labels = flow.labels(source)
    dim = int(op.arg("dim") or 0) % len(labels)
    parts: list[Label] = [None] * len(op.outputs)
    label = labels[dim]
    sizes = [flow.shape(i)[dim] for i in op.outputs]
    if label is not None:
        pieces = np.split(label, np.cumsum(sizes)[:-1])
        parts = list(pieces)
        _free_or_tie(flow, op, label, pieces)
    for index, part in zip(op.outputs, parts, strict=True):
        flow.set(index, [*labels[:dim], part, *labels[dim + 1 :]])


def _free_or_tie(flow: Flow, op: Op, label: np.ndarray, pieces: list[np.ndarray]) -> None:
    """Decide what the parts of a split may lose, from where their sizes come."""
    sizes = [len(piece) for piece in pieces]
    literal = op.args[1] if len(op.args) > 1 else op.kwargs.get("split_size", op.kwargs.get("split_sizes"))
    if (op.call is None or op.call.name != "chunk") and flow.sized_by_attribute(op, literal, pieces):
        for piece in pieces:
            flow.floor(piece, op)
    elif len(set(sizes)) == 1:
        for piece in pieces[1:]:
            flow.tie(piece, pieces[0], op)
    else:
        flow.fix_sizes(label, op, sizes)


@operator("glu")
def gate(flow: Flow, op: Op) -> None:
    """The first half of a dim times a gate from its second half: both keep the same places."""
    labels = list(flow.labels(op.inputs()[0]))
    dim = int(op.arg("dim"))
    label = labels[dim]
    if label is not None:
        halves = label.reshape(2, -1)
        flow.tie(halves[1], halves[0], op)
        labels[dim] = halves[0]
    flow.set(op.outputs[0], labels)


@operator("slice", "slice_copy", sized=True)
def slice_(flow: Flow, op: Op) -> None:
    """A range of one dim."""
    source = op.inputs()[0]
    labels, shape = list(flow.labels(source)), flow.shape(source)
    dim = int(op.arg("dim") or 0)
    label = labels[dim]
    if label is not None:
        part = label[slice(op.arg("start"), op.arg("end"), op.arg("step"))]
        labels[dim] = part
        if 0 < len(part) < shape[dim]:
            flow.floor(part, op)
    flow.set(op.outputs[0], labels)
    flow.pass_uniform(op)


@operator("select", "select_copy")
def select(flow: Flow, op: Op) -> None:
    """One index of one dim: it stays, and so do those that its number counts."""
    labels = list(flow.labels(op.inputs()[0]))
    label, at = labels.pop(int(op.arg("dim"))), int(op.arg("index"))
    written = (user for user in flow.users.get(op.outputs[0], ()) if user.writes())
    if any(op.outputs[0] in user.outputs for user in written):
        flow.numbered.add((op.inputs()[0], int(op.arg("dim")) % (len(labels) + 1)))
    if label is not None:
        flow.freeze(label[at:] if at < 0 else label[: at + 1], op, "one index is read by number")
    flow.set(op.outputs[0], labels)
    flow.pass_uniform(op)


@operator("unbind", "unbind_copy", splits=True)
def unbind(flow: Flow, op: Op) -> None:
    """Every index of one dim as a tensor of its own."""
    labels = list(flow.labels(op.inputs()[0]))
    flow.freeze(labels.pop(int(op.arg("dim") or 0)), op, "a dim is taken apart index by index")
    for index in op.outputs:
        flow.set(index, labels)
    flow.pass_uniform(op)


@operator("index_select")
def index_select(flow: Flow, op: Op) -> None:
    """Places along one dim are picked."""
    _pick(flow, op, [int(op.arg("dim")) % len(flow.shape(op.inputs()[0]))])


def _index_everywhere(func: Any, args: Any, kwargs: Any) -> Any:
    """All elements in place of those that a mask names."""
    x, indices, *rest = args
    if not any(_names_elements(index) for index in indices):
        return func(*args, **kwargs)
    places: list[torch.Tensor | None] = []
    for index in indices:
        places += everywhere(index) if _names_elements(index) else [index]
    return func(x, places, *rest, **kwargs)


def _names_elements(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in MASKS and without_values(index)


def _by_a_mask(trace: Trace, op: Op) -> bool:
    return any(trace.values[index].dtype in MASKS for index in op.reads[1:])


@operator("index", largest=_index_everywhere, value_sized=_by_a_mask)
def index(flow: Flow, op: Op) -> None:
    """Places along one dim or several are picked; a mask of n dims names n of them."""
    named: list[int] = []
    dim = 0
    for ref in op.arg("indices"):
        size = len(flow.shape(ref.index)) if ref is not None and _is_mask(flow, ref.index) else 1
        named += range(dim, dim + size) if ref is not None else ()
        dim += size
    _pick(flow, op, named)


def _is_mask(flow: Flow, picks: int) -> bool:
    return flow.trace.values[picks].dtype in MASKS


def _pick(flow: Flow, op: Op, named: list[int]) -> None:
    """Picked dims stay, unless a buffer names channels; the others pass, and so do those of an activation alone.

    What is picked takes the place of the named dims where these follow one another, else it comes first.
    """
    source, *indices = op.inputs()
    labels = flow.labels(source)
    along = labels[named[0]] if len(named) == len(indices) == 1 and len(flow.shape(indices[0])) == 1 else None
    if along is not None:
        by_number = flow.pick(along, flow.copied_from(indices[0]), op)
        if by_number is not None:
            flow.set(op.outputs[0], [*labels[: named[0]], by_number, *labels[named[0] + 1 :]])
            return
    for d in named:
        flow.freeze(labels[d], op, "channels are picked by an index tensor")
    rest = [label for d, label in enumerate(labels) if d not in named]
    picked: list[Label] = [None] * (len(flow.shape(op.outputs[0])) - len(rest))
    active = [i for i in indices if i in flow.active and not _is_mask(flow, i)]
    if len(indices) == 1 and active:
        picked = list(flow.labels(indices[0]))
    else:
        for label in (label for i in active for label in flow.labels(i)):
            flow.freeze(label, op, "channels are picked by several index tensors")
    at = named[0] if named[-1] - named[0] + 1 == len(named) else 0
    flow.set(op.outputs[0], [*rest[:at], *picked, *rest[at:]])
    if active and source not in flow.active and len(rest) > 1:  # a matrix; a row of a table is an embedding
        flow.picked.update(op.outputs)


@operator("gather")
def gather(flow: Flow, op: Op) -> None:
    """Places along one dim are picked: channels by a buffer that is repeated on all others, else for each of them."""
    source, index = op.inputs()
    labels, shape = list(flow.labels(source)), flow.shape(source)
    at = int(op.arg("dim")) % max(len(shape), 1)
    others = [dim for dim in range(len(shape)) if dim != at]
    if any(flow.shape(index)[dim] != shape[dim] for dim in others):
        flow.refuse(op, "places are picked from a part of what there is")
        return
    along = labels[at] if labels else None
    buffer, named = flow.trace.root(index), None
    if along is not None and len(flow.shape(buffer)) == 1 and flow.labels(index)[at] is not None:
        named = flow.pick(along, buffer, op)
    if named is None:
        flow.freeze(along, op, "channels are picked by an index tensor")
    _repeated_like(flow, op, index, [(dim, labels[dim]) for dim in others])
    flow.set(op.outputs[0], [named if dim == at else label for dim, label in enumerate(labels)])


def _taken_along(
    input: torch.Tensor, indices: torch.Tensor, dim: int | None = None, *, out: torch.Tensor | None = None
) -> tuple[Any, tuple[Any, ...]] | None:
    """`torch.take_along_dim` is `gather`, once both are as large, and what names places from the end was counted anew.

    That is arithmetic, which hides what the places come from; on tensors without values there is nothing to count.
    """
    if dim is None or out is not None or not (input.is_meta and indices.is_meta and input.dim() == indices.dim()):
        return None
    at = dim % input.dim()

    def sizes(own: torch.Tensor, other: torch.Tensor) -> list[int]:
        pairs = enumerate(zip(own.shape, other.shape, strict=True))
        return [n if d == at or m == 1 else m for d, (n, m) in pairs]

    wide, places = input.expand(sizes(input, indices)), indices.expand(sizes(indices, input))
    return torch.ops.aten.gather.default, (wide, at, places)


AS_ONE_CALL[torch.take_along_dim] = _taken_along
AS_ONE_CALL[torch.Tensor.take_along_dim] = _taken_along


def _repeated_like(flow: Flow, op: Op, index: int, dims: list[tuple[int, Label]]) -> None:
    """On these dims, an index has the channels of what it is for: as many as are left, where it is repeated."""
    for dim, label in dims:
        own = list(flow.labels(index))
        if flow.is_repeated(index, dim):
            flow.repeat(index, dim, label, op)
        else:
            flow.unify(label, own[dim], op)


@operator("index_put", largest=_index_everywhere)
@operator("_index_put_impl")
def put(flow: Flow, op: Op) -> None:
    """Places along one dim are written; on the other dims what is written is the same channels."""
    target, *indices, values = op.inputs()
    if len(indices) != 1 or len(flow.shape(indices[0])) != 1:
        flow.refuse(op, "writing to places named by several tensors")
        return
    at = next(d for d, ref in enumerate(op.arg("indices")) if ref is not None)
    _into_places(flow, op, target, values, at)


@operator("scatter", "scatter_add", "index_add", "scatter_reduce", "index_reduce")
def put_together(flow: Flow, op: Op) -> None:
    """What goes to the same place of one dim becomes one there; on the other dims it is the same channels.

    Where one number goes to all places, these have the channels of the index.
    """
    target, index, *given = op.inputs()
    values = given[0] if given else index
    shape, at = flow.shape(target), int(op.arg("dim")) % len(flow.shape(target))
    others = [d for d in range(len(shape)) if d != at]
    if any(flow.shape(values)[d] != shape[d] for d in others):
        flow.refuse(op, "a part of what there is goes to its places")
        return
    if values != index and len(flow.shape(index)) == len(shape) > 1:
        _repeated_like(flow, op, index, [(dim, flow.labels(values)[dim]) for dim in others])
    _into_places(flow, op, target, values, at)


def _into_places(flow: Flow, op: Op, target: int, values: int, at: int) -> None:
    """Values go to places along one dim of the target."""
    labels, shape = list(flow.labels(target)), flow.shape(target)
    written = [None] * (len(shape) - len(flow.shape(values))) + list(flow.labels(values))
    sizes = [1] * (len(shape) - len(flow.shape(values))) + list(flow.shape(values))
    for dim, label in enumerate(written):
        if dim == at:
            flow.freeze(label, op, "channels are picked by an index tensor")
            flow.freeze(labels[dim], op, "channels are picked by an index tensor")
        elif target in flow.uniform:
            labels[dim] = label if sizes[dim] == shape[dim] else None
        elif values not in flow.uniform and sizes[dim] == shape[dim]:
            labels[dim] = flow.unify(labels[dim], label, op) if label is not labels[dim] else label
    memory = flow.trace.root(op.outputs[0])
    if memory in flow.uniform and flow.shape(memory) == shape:
        flow.set(memory, labels)
    elif target in flow.uniform:
        adopt(flow, op, target, labels)
    flow.set(op.outputs[0], labels)


def _nonzero_everywhere(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if not without_values(x) or not x.dim():
        return func(*args, **kwargs)
    return torch.stack(everywhere(x), 1)


def _select_everything(func: Any, args: Any, kwargs: Any) -> Any:
    if not without_values(args[1]):
        return func(*args, **kwargs)
    return torch.broadcast_tensors(*args)[0].reshape(-1).clone()


def _suppress_nothing(func: Any, args: Any, kwargs: Any) -> Any:
    """Keeps all boxes, in the order of their scores."""
    scores = args[1]
    return scores.argsort(descending=True) if without_values(scores) else func(*args, **kwargs)


def _always(trace: Trace, op: Op) -> bool:
    return True


# Boxes carry no channels, so suppression needs no rule.
declare(Declaration(largest=_suppress_nothing, value_sized=_always), "torchvision::nms")


@operator("nonzero", largest=_nonzero_everywhere, value_sized=_always)
@operator("masked_select", largest=_select_everything, value_sized=_always)
def pick_by_value(flow: Flow, op: Op) -> None:
    """Which elements are picked depends on their values, so every channel stays."""
    for value in op.inputs():
        for label in flow.labels(value):
            flow.freeze(label, op, "elements are picked by their values")
    flow.set(op.outputs[0], [None] * len(flow.shape(op.outputs[0])))


@operator("topk")
def largest_along_dim(flow: Flow, op: Op) -> None:
    """The largest along one dim, which so must stay; the others pass."""
    labels = list(flow.labels(op.inputs()[0]))
    if labels:
        dim = -1 if op.arg("dim") is None else int(op.arg("dim"))
        flow.freeze(labels[dim], op, "the largest of all channels are picked")
        labels[dim] = None
    for value in op.outputs:
        flow.set(value, labels)


@operator("constant_pad_nd")
def constant_pad(flow: Flow, op: Op) -> None:
    """Padding from the last dim backwards; what is added stays, and what is cropped, as their numbers are written."""
    labels = list(flow.labels(op.inputs()[0]))
    pads = op.arg("pad")
    for k in range(len(pads) // 2):
        dim = len(labels) - 1 - k
        label = labels[dim]
        if label is not None:
            before, after = int(pads[2 * k]), int(pads[2 * k + 1])
            first, last = max(-before, 0), len(label) - max(-after, 0)
            flow.freeze(np.concatenate([label[:first], label[last:]]), op, "channels are cropped")
            added = [np.full(max(n, 0), FROZEN) for n in (before, after)]
            labels[dim] = np.concatenate([added[0], label[first:last], added[1]])
    flow.set(op.outputs[0], labels)


@operator("roll")
def roll(flow: Flow, op: Op) -> None:
    """Dims are rotated; rotated channels stay."""
    labels = flow.labels(op.inputs()[0])
    for d in op.arg("dims") or range(len(labels)):
        flow.freeze(labels[d], op, "channels are rotated")
    flow.set(op.outputs[0], labels)

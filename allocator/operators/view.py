"""Operators that rearrange dims: views, permutations, expansion, channel shuffles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from allocator.flow.flow import Flow
from allocator.flow.labels import Label
from allocator.tracing.calls import Op
from allocator.tracing.operators import operator

Shape = tuple[int, ...]
# Where a vector of one element becomes one of these many dims, sizes do not tell which of them is its own: it is
# taken to be the second, as a scale of channels has it. (A wrong guess only keeps neurons.)
_CHANNELS_SECOND = (2, 4, 5)


@operator("alias", "detach", "clone", "contiguous", copies=True)
@operator(
    "_to_copy", "to", "lift_fresh", "lift_fresh_copy", "view_as",
    "resolve_conj", "resolve_neg", "positive", "fill", "zero",
)  # fmt: skip
def identity(flow: Flow, op: Op) -> None:
    """The same indices in the same places."""
    source = op.inputs()[0]
    uniform = source in flow.uniform
    for index in op.outputs:
        flow.set(index, flow.labels(source))
    if uniform:
        flow.uniform.update(op.outputs)
    flow.repeats.passed(op, range(len(flow.shape(source))))
    if op.declared.copies and flow.is_zero(source):
        flow.zeros.update(op.outputs)


@operator("resize", sized=True)
def resize(flow: Flow, op: Op) -> None:
    """The size that it has already, as where a result is written into it; else what is the same everywhere."""
    source, out = op.inputs()[0], op.outputs[0]
    if flow.shape(source) == flow.shape(out):
        identity(flow, op)
    elif source in flow.uniform:
        flow.set(out, [None] * len(flow.shape(out)))
        flow.uniform.add(out)
    else:
        flow.refuse(op, "memory is given another size")


@operator("set")
def give_away(flow: Flow, op: Op) -> None:
    """Memory that is given away, as `x.set_()` does of what is not read again; other memory may be anything."""
    if len(op.inputs()) > 1 or op.arg("source") is not None:
        flow.refuse(op, "is given other memory")


@operator("as_strided", restrides=True)
def as_strided(flow: Flow, op: Op) -> None:
    """Other strides for dims of size 1 (how pooling marks a memory format) move nothing; all else is refused."""
    shape, strides = flow.shape(op.inputs()[0]), op.arg("stride")
    dense = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    same = shape == flow.shape(op.outputs[0])
    if same and all(n == 1 or strides[d] == dense[d] for d, n in enumerate(shape)):
        identity(flow, op)
    else:
        flow.refuse(op, "reads memory by strides")


@operator(
    "view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy",
    sized=True, reshapes=True, stands_for="view",
)  # fmt: skip
def view(flow: Flow, op: Op) -> None:
    """Merged dims repeat their labels; a dim that is split keeps every factor but one whole."""
    source, out = op.inputs()[0], op.outputs[0]
    labels, shape, target = flow.labels(source), flow.shape(source), flow.shape(out)
    result: list[Label] = [None] * len(target)
    same: list[int | None] = [None] * len(target)
    for ins, outs in factor_groups(shape, target):
        merged = _merge(flow, op, [labels[d] for d in ins], [shape[d] for d in ins])
        if merged is not None:
            parts = unflatten(flow, op, merged, [target[d] for d in outs], outs)
            for d, label in zip(outs, parts, strict=True):
                result[d] = label
                if label is not None and _hides_a_single_one(shape, labels, target, d):
                    flow.floor(label, op, minimum=min(2, len(label)))
        elif len(ins) == len(outs) == 1:
            same[outs[0]] = ins[0]
    if shape == (1,) and len(target) in _CHANNELS_SECOND:
        result[:2] = [None, labels[0]]
    flow.set(out, result)
    flow.pass_uniform(op)
    flow.repeats.passed(op, same)


def _hides_a_single_one(shape: Shape, labels: Sequence[Label], target: Shape, dim: int) -> bool:
    """Whether sizes would not tell that a dim of the result comes from the dim with channels, were there one channel.

    Dims of size 1 are then taken for one another, as in a view of (6, 1, C) as (2, 3, C).
    """
    sources = [d for d, label in enumerate(labels) if label is not None and shape[d] > 1]
    if len(sources) != 1 or target[dim] != shape[sources[0]]:
        return False
    (source,) = sources
    single = factor_groups((*shape[:source], 1, *shape[source + 1 :]), (*target[:dim], 1, *target[dim + 1 :]))
    return not any(source in ins and dim in outs for ins, outs in single)


def factor_groups(shape: Shape, target: Shape) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dims of `shape` and `target` that hold the same number of elements.

    >>> factor_groups((2, 6, 5), (2, 3, 2, 5))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(shape) or j < len(target):
        ins, outs = [i] if i < len(shape) else [], [j] if j < len(target) else []
        a = shape[i] if ins else 1
        b = target[j] if outs else 1
        i, j = i + len(ins), j + len(outs)
        while a != b:
            if a < b and i < len(shape):
                ins.append(i)
                a, i = a * shape[i], i + 1
            elif j < len(target):
                outs.append(j)
                b, j = b * target[j], j + 1
            else:
                break
        groups.append((ins, outs))
    return groups


def _merge(flow: Flow, op: Op, labels: Sequence[Label], sizes: Sequence[int]) -> Label:
    """Labels of the flattened dims; only one of them may lose indices, one that does not stay anyway where there is."""
    labelled = [k for k, label in enumerate(labels) if label is not None]
    labelled = [k for k in labelled if sizes[k] > 1] or labelled[:1]
    labelled.sort(key=lambda k: flow.stay(labels[k]))
    for k in labelled[1:]:
        flow.freeze(labels[k], op, "two dims with neurons are flattened into one")
    if not labelled:
        return None
    k = labelled[0]
    label = labels[k]
    assert label is not None
    before = int(np.prod(sizes[:k], dtype=np.int64))
    after = int(np.prod(sizes[k + 1 :], dtype=np.int64))
    return np.tile(np.repeat(label, after), before)


def unflatten(flow: Flow, op: Op, label: np.ndarray, sizes: Sequence[int], outs: Sequence[int]) -> list[Label]:
    """Split labels over the dims `outs`; the last that varies may lose indices, or heads, the others stay whole."""
    if len(sizes) < 2:
        return [label] if sizes else []
    grid = label.reshape(sizes)
    varying = [d for d, n in enumerate(sizes) if n > 1 and not _constant(grid, d)]
    result: list[Label] = [None] * len(sizes)
    heads, channels = flow.heads_at(op), flow.channels_at(op)
    if len(label) == 1:
        varying = [len(sizes) - 1]
    if not varying:
        flow.freeze(label, op, "a view leaves no dim for these neurons")
        return result
    keep = next((outs.index(dim) for dim in (heads, channels) if dim in outs), varying[-1])
    first = tuple(slice(None) if d == keep else slice(0, 1) for d in range(len(sizes)))
    kept = grid[first].reshape(-1)
    if varying != [keep]:
        flow.tie(grid, grid[first], op)
    if heads in outs:
        flow.note_heads(kept, op)
    elif len(varying) > 1 and channels not in outs:
        flow.divide(op, [outs[d] for d in varying], kept)
    result[keep] = kept
    return result


def _constant(grid: np.ndarray, dim: int) -> bool:
    return bool((grid == grid.take([0], axis=dim)).all())


@operator("unsqueeze")
def unsqueeze(flow: Flow, op: Op) -> None:
    """A new dim of size 1."""
    labels = list(flow.labels(op.inputs()[0]))
    dim = int(op.arg("dim"))
    at = dim if dim >= 0 else dim + len(labels) + 1
    labels.insert(at, None)
    flow.set(op.outputs[0], labels)
    flow.pass_uniform(op)
    flow.repeats.passed(op, [*range(at), None, *range(at, len(labels) - 1)])


@operator("squeeze")
def squeeze(flow: Flow, op: Op) -> None:
    """Dims of size 1 go: all of them, or those named."""
    source = op.inputs()[0]
    shape, labels = flow.shape(source), flow.labels(source)
    dims = op.arg("dim")
    named = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(shape) for d in named if shape[d] == 1}
    for d in gone:
        flow.freeze(labels[d], op, "a dim of size 1 is dropped")
    flow.set(op.outputs[0], [label for d, label in enumerate(labels) if d not in gone])


@operator("permute")
def permute(flow: Flow, op: Op) -> None:
    """Dims change places."""
    labels = flow.labels(op.inputs()[0])
    dims = [int(d) % len(labels) for d in op.arg("dims")]
    flow.set(op.outputs[0], [labels[d] for d in dims])
    flow.repeats.passed(op, dims)


@operator("t", "numpy_T")
def matrix_transpose(flow: Flow, op: Op) -> None:
    """The two dims change places."""
    flow.set(op.outputs[0], list(reversed(flow.labels(op.inputs()[0]))))


@operator("transpose", "swapaxes")
def transpose(flow: Flow, op: Op) -> None:
    """Two dims change places."""
    labels = list(flow.labels(op.inputs()[0]))
    a, b = (int(op.args[k]) for k in (1, 2))
    labels[a], labels[b] = labels[b], labels[a]
    flow.set(op.outputs[0], labels)
    dims = list(range(len(labels)))
    dims[a], dims[b] = dims[b], dims[a]
    flow.repeats.passed(op, dims)


@operator("expand", "expand_copy", sized=True)
def expand(flow: Flow, op: Op) -> None:
    """Dims of size 1 grow, and so have no labels; new dims come first."""
    source, out = op.inputs()[0], flow.shape(op.outputs[0])
    shape, labels = flow.shape(source), list(flow.labels(source))
    fresh = len(out) - len(shape)
    for d, size in enumerate(shape):
        if out[fresh + d] != size:
            flow.freeze(labels[d], op, "a dim of size 1 is repeated")
            labels[d] = None
    flow.set(op.outputs[0], [None] * fresh + labels)
    flow.pass_uniform(op)
    flow.repeats.passed(op, [None] * fresh + [*range(len(shape))])
    _note_repeated(flow, op)
    if math.prod(shape) == 1:
        flow.uniform.update(op.outputs)


def _note_repeated(flow: Flow, op: Op) -> None:
    """Dims that are new, or were of size 1."""
    shape, out = flow.shape(op.inputs()[0]), flow.shape(op.outputs[0])
    fresh = len(out) - len(shape)
    for dim, size in enumerate(out):
        if size > 1 and (dim < fresh or shape[dim - fresh] == 1):
            flow.repeats.note((op.outputs[0], dim))


@operator("repeat", sized=True)
def repeat(flow: Flow, op: Op) -> None:
    """Whole dims are repeated one after the other."""
    labels = list(flow.labels(op.inputs()[0]))
    times = op.arg("repeats")
    own = times[len(times) - len(labels) :]
    for d, (size, n) in enumerate(zip(flow.shape(op.inputs()[0]), own, strict=True)):
        if size == 1 and n > 1:
            flow.freeze(labels[d], op, "a dim of size 1 is repeated")
            labels[d] = None
    tiled = [None if lab is None else np.tile(lab, n) for lab, n in zip(labels, own, strict=True)]
    flow.set(op.outputs[0], [None] * (len(times) - len(labels)) + tiled)
    _note_repeated(flow, op)


@operator("flip")
def flip(flow: Flow, op: Op) -> None:
    """Dims are read backwards."""
    labels = list(flow.labels(op.inputs()[0]))
    for d in op.arg("dims"):
        labels[d] = _backwards(labels[d])
    flow.set(op.outputs[0], labels)


@operator("rot90")
def rotate(flow: Flow, op: Op) -> None:
    """Two dims are turned from the first towards the second, by right angles."""
    labels = list(flow.labels(op.inputs()[0]))
    a, b = op.arg("dims")
    for _ in range(int(op.arg("k")) % 4):
        labels[a], labels[b] = _backwards(labels[b]), labels[a]
    flow.set(op.outputs[0], labels)


def _backwards(label: Label) -> Label:
    return None if label is None else label[::-1]


_ORDERED = {"tril": (0, -1), "triu": (0, 1)}
"""Diagonals that a triangle of a square begins at, so that it holds what it should of any rows and the same columns."""


@operator("tril", "triu")
def triangle(flow: Flow, op: Op) -> None:
    """Numbers on one side of a diagonal: rows and columns go together, as which side one is on is their order."""
    labels = flow.labels(op.inputs()[0])
    rows, columns = labels[-2:]
    square = rows is not None and columns is not None and len(rows) == len(columns)
    if square and not flow.options.grows and int(op.arg("diagonal") or 0) in _ORDERED[op.name.rstrip("_")]:
        flow.unify(rows, columns, op)
    else:
        flow.freeze_all([rows, columns], op, "a triangle holds numbers by their places")
    for index in op.outputs:
        flow.set(index, labels)


@operator("pixel_shuffle")
def pixel_shuffle(flow: Flow, op: Op) -> None:
    """(C r r, H, W) to (C, H r, W r): a channel's r*r inputs go together."""
    labels = list(flow.labels(op.inputs()[0]))
    factor = int(op.arg("upscale_factor")) ** 2
    _resample(flow, op, labels)
    channels = labels[-3]
    if channels is not None:
        grid = channels.reshape(-1, factor)
        flow.tie(grid, grid[:, :1], op)
        labels[-3] = grid[:, 0]
    flow.set(op.outputs[0], labels)


@operator("pixel_unshuffle")
def pixel_unshuffle(flow: Flow, op: Op) -> None:
    """(C, H r, W r) to (C r r, H, W)."""
    labels = list(flow.labels(op.inputs()[0]))
    _resample(flow, op, labels)
    channels = labels[-3]
    if channels is not None:
        labels[-3] = np.repeat(channels, int(op.arg("downscale_factor")) ** 2)
    flow.set(op.outputs[0], labels)


def _resample(flow: Flow, op: Op, labels: list[Label]) -> None:
    """Pixels change places with channels: the last two dims stay, and carry nothing further."""
    for d in (-2, -1):
        flow.freeze(labels[d], op, "this dim is resampled")
        labels[d] = None


@operator("channel_shuffle", sized=True)
@operator("native_channel_shuffle")
def channel_shuffle(flow: Flow, op: Op) -> None:
    """(G, K) to (K, G): every group keeps the same places, so that the order survives."""
    labels = list(flow.labels(op.inputs()[0]))
    channels = labels[1]
    if channels is not None:
        grid = channels.reshape(int(op.arg("groups")), -1)
        flow.tie(grid, grid[:1], op)
        labels[1] = grid.T.reshape(-1)
    flow.set(op.outputs[0], labels)

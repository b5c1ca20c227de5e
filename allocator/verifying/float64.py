"""Forwards in float64, with some weights read as zero or drawn anew, one weight converted at a time.

No default of the process is changed for it: every function is given float64 tensors and gives such. The forward itself
is told the dtype that it would see otherwise, so that one which asserts float32 runs like any other.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import weakref
import zlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from allocator.graph.channel_graph import ChannelGraph
from allocator.modules import on_a_copy, set_training, tensor_names
from allocator.rewriting.index_map import IndexMap, Maps
from allocator.torch_private import map_arguments
from allocator.tracing.inputs import Inputs, dtype_of
from allocator.tracing.isolation import apart, undisturbed
from allocator.tracing.journal import unnoted
from allocator.tracing.operators import FUNCTIONS, Function
from allocator.tracing.outputs import said_in, tensors_in
from allocator.tracing.sharing import Shared, SharedWrite, address_of
from allocator.verifying.alike import Alike

_Dims = list[tuple[int, np.ndarray]]
Rows = dict[str, _Dims]
# Bytes of the columns that a convolution on the CPU may unfold its input to, all channels together.
COLUMNS = 4 << 20


def part_of(tensor: torch.Tensor, maps: Sequence[IndexMap | None]) -> torch.Tensor:
    """The elements at the crossings of the source indices of every dim; all of a dim that has no map."""
    for dim, index_map in enumerate(maps):
        if index_map is not None:
            index = torch.as_tensor(index_map.source, device=tensor.device)
            tensor = tensor.index_select(dim, index)
    return tensor


def run_float64(
    model: nn.Module,
    inputs: Inputs,
    *,
    zeroed: Rows | None = None,
    draw: Draw | None = None,
    dtype: torch.dtype = torch.float64,
    nudge: int = 0,
    fill: float = 0.0,
    written: Collection[str] | None = None,
    by_value: Collection[str] = (),
    alike: Alike | None = None,
    said: list[Any] | None = None,
) -> list[torch.Tensor]:
    """Output tensors of an eval-mode forward in float64; weights are converted one call at a time.

    Args:
        model: any module; not changed, and only its buffers are copied, since a forward may write into them.
        inputs: converted to float64 like the weights.
        zeroed: per parameter, (dim, indices) that are read as zero.
        draw: gives values to use in place of the model's parameters and running statistics.
        dtype: what is computed in, float32 where a forward refuses float64.
        nudge: a seed by which every weight is changed a little, to see what outputs owe to rounding; 0 for none.
        fill: what `zeroed` is read as instead; of a weight that is computed, what it is computed from. What chooses by
            truth values then gives no number for one that it left out.
        written: names of the parameters that the forward writes into, where that is known: no others are copied.
        by_value: names of those that it may write into by other ways than torch's: they are wide from the start.
        alike: stands in for what calls draw at random.
        said: gets the numbers and words that the model returns beside tensors.

    Returns:
        Tensors on the CPU in float64; of complex ones the last dim is (real, imaginary). Where all are of whole
        numbers, what the last of them were made from as well (of an argmax, the scores): that they agree shows more.

    Raises:
        SharedWrite: the forward would write into others than `written`, or gives one that is not in `by_value` away.
    """

    def own(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in by_value and tensor.is_floating_point():
            return _value(name, tensor, draw, nudge, dtype).to(dtype, copy=True)
        if _reads_only(tensor, dtype):
            return tensor
        known = written is not None and isinstance(tensor, nn.Parameter) and name not in written
        shared.extend([tensor] if known else [])
        return tensor if known else tensor.clone()

    shared: list[torch.Tensor] = []

    def forward(copied: nn.Module) -> list[torch.Tensor]:
        set_training(copied, False)
        direct = {name: rows for name, rows in (zeroed or {}).items() if fill or not _zero_computed(copied, name, rows)}
        mode = _Wide(copied, direct, *((None, dtype, 0) if by_value else (draw, dtype, nudge)), fill)
        mode.shared, mode.said = Shared(shared), dtype_of(model)
        mode.weights = mode.weights if not by_value else set()
        drawing = contextlib.nullcontext() if alike is None else alike.drawing()
        mode.alike = alike is not None
        with torch.no_grad(), undisturbed(model), mode, drawing:
            arguments = inputs.map(lambda t: mode.convert(t).clone())  # a forward may write into its inputs
            output = apart(copied, *arguments.args, **arguments.kwargs)
        tensors = tensors_in(output)
        if said is not None:
            said.extend(said_in(output))
        if not any(t.is_floating_point() or t.is_complex() for t in tensors):
            tensors += mode.rounded
        return [_plain(part) for t in tensors for part in (t.unbind() if t.is_nested else [t])]

    return on_a_copy(model, own, forward)


def _reads_only(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether no write can reach this tensor: what is not in `dtype` yet is converted before any call sees it."""
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.dtype != dtype


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.to("cpu", torch.float64)


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one is a view of the other."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _filled(tensor: torch.Tensor, rows: _Dims, value: float) -> torch.Tensor:
    for dim, indices in rows:
        tensor.index_fill_(dim, torch.as_tensor(indices, device=tensor.device), value)
    return tensor


def _zero_computed(copied: nn.Module, name: str, rows: _Dims) -> bool:
    """Zero a weight that a parametrisation computes after it was computed; whether there was one to zero."""
    owner = copied.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, ParametrizationList):
        return False

    def zero(module: nn.Module, args: Any, weight: torch.Tensor) -> torch.Tensor:
        return _filled(weight.clone(), rows, 0.0)

    owner.register_forward_hook(zero)
    return True


class Draw:
    """Weights drawn from a seed, the same for a name whatever is kept of it.

    Matrices and kernels are uniform with the variance 2 / fan-in (He et al., ICCV 2015), vectors uniform in
    0.5..1.5, so that signals neither vanish nor grow on their way; of buffers running statistics are drawn, and masks
    opened. They are numbers of float32, which any wider dtype holds.
    """

    def __init__(self, graph: ChannelGraph, seed: int, maps: Maps | None = None) -> None:
        self.graph, self.shapes, self.seed, self.maps = graph, graph.slots.shapes, seed, maps or {}

    def __call__(self, name: str, own: torch.Tensor) -> torch.Tensor:
        shape = self.shapes[name]
        statistic = name.endswith(("running_mean", "running_var"))
        if not shape:
            return own
        generator = np.random.Generator(np.random.SFC64(zlib.crc32(f"{self.seed} {name}".encode())))
        values = torch.from_numpy(generator.random(shape, dtype=np.float32))
        if not (isinstance(own, nn.Parameter) or statistic):
            opened = self._opened(name, values)
            return own if opened is None else part_of(opened, self.maps.get(name, ())).to(own.device)
        if len(shape) == 1:
            values += 0.5
        else:
            values = values.mul_(2).sub_(1).mul_((6 / max(math.prod(shape[1:]), 1)) ** 0.5)
        return part_of(values, self.maps.get(name, ())).to(own.device)

    def _opened(self, name: str, values: torch.Tensor) -> torch.Tensor | None:
        """A buffer that closes neurons, by zeros or truth values, where they are not closed; None for any other.

        What it closes is what goes first, and would show nothing.
        """
        own, starts = self.graph.tensors[name].detach(), self.graph.slots.base[name]
        neurons = torch.zeros(own.shape, dtype=torch.bool)
        for dim, (start, size) in enumerate(zip(starts, own.shape, strict=True)):
            free = torch.from_numpy(self.graph.unit_of_slot[start : start + size] >= 0)
            neurons |= free.view(-1, *[1] * (own.dim() - dim - 1))
        if own.dtype == torch.bool:
            return own.cpu() ^ (neurons & (values < 0.5)) if neurons.any() else None
        closed = neurons & (own == 0).cpu() if own.is_floating_point() else neurons.zero_()
        return own.cpu().masked_fill(closed, 1.0) if closed.any() else None


def _value(name: str, tensor: torch.Tensor, draw: Draw | None, nudge: int, dtype: torch.dtype) -> torch.Tensor:
    """What stands in for a weight: one that is drawn, or is changed a little."""
    value = tensor if draw is None else draw(name, tensor)
    return _nudged(value, name, nudge, dtype) if nudge and value.is_floating_point() else value


_GIVING = frozenset({"numpy", "__array__", "__dlpack__"})
"""What gives the memory of a tensor to others than torch, which may write into it."""


class _Wide(TorchFunctionMode):
    """Runs every function in one wide dtype, with rows of some weights read as zero; copies one weight at a time."""

    def __init__(
        self, model: nn.Module, zeroed: Rows, draw: Draw | None, dtype: torch.dtype, nudge: int, fill: float
    ) -> None:
        """`rounded` holds what the last call that gave whole numbers read; `written` what was converted and written."""
        super().__init__()
        names = tensor_names(model)
        self.rows = {id(names[name]): rows for name, rows in zeroed.items()}
        self.zeroed: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor | _Dims]] = {}
        self.draw, self.dtype, self.nudge, self.fill = draw, dtype, nudge, fill
        self.names = {id(tensor): name for name, tensor in names.items()} if draw is not None or nudge else {}
        self.said = dtype
        self.weights = set(map(id, names.values()))
        self.converted: set[int | None] = set()  # where those of them lie that were
        self.complex = dtype.to_complex()
        self.rounded: list[torch.Tensor] = []
        self.alike = False
        self.shared = Shared()
        self.unrounded: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}
        self.written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @unnoted
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.shared.spare(func, args, kwargs)
        if name in _GIVING and address_of(args[0]) in self.converted - {None}:
            raise SharedWrite
        if name == "__get__" and func.__self__.__name__ not in _VIEWS:
            found = func(*args, **(kwargs or {}))
            return self.said if found is self.dtype else found
        if func in _NARROWING:
            return args[0].to(self.dtype)
        given = args, kwargs or {}
        args, kwargs = map_arguments(self.convert, given)
        declared = FUNCTIONS.get(name)
        if declared is not None and declared.orders:
            args, kwargs = map_arguments(_rounded, (args, kwargs))
        if declared is not None and declared.trusts and any(bool(t.isnan().any()) for t in tensors_in((args, kwargs))):
            raise ValueError(f"{name} is given NaN, at which it may end the process")
        called = functools.partial(_convolve, func) if func in _CONVOLUTIONS else func
        if self.alike and declared is not None and declared.in_parts is not None:
            called = declared.in_parts  # fused, it would draw within
        out = called(*args, **kwargs)
        out = self._zero_again(func, args, kwargs, out) if self.zeroed and isinstance(out, torch.Tensor) else out
        if name.endswith("_") or "out" in kwargs:
            self._note_written(given, (args, kwargs))
        if self.fill:
            out = _with_left_out(name, tensors_in((args, kwargs)), out)
        if isinstance(out, torch.Tensor):
            self._note_rounded(args, out, declared)
            return self.widen(out)
        if out is self.dtype:
            return self.said
        return map_arguments(self.widen, out) if isinstance(out, (tuple, list)) else out

    def _zero_again(self, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> torch.Tensor:
        """What is computed from weights alone, number by number, is zero where they are read as zero.

        Where that is, is seen by numbers that are none: those of a function that mixes them are another number. Beside
        what is not read as zero, as the length of a weight, it is where zeros were divided by zero.
        """
        given = [t for t in tensors_in((args, kwargs)) if t.is_floating_point() and t.numel() > 1]
        if not given or not out.is_floating_point() or out.numel() != given[0].numel():
            return out
        alone = all(self._is_zeroed(t) for t in given)
        if not (alone or (self._is_zeroed(given[0]) and bool(out.isnan().any()))):
            return out
        spoilt = map_arguments(self._spoilt, (args, kwargs))
        where = func(*spoilt[0], **spoilt[1]).isnan()
        expected = int(self._spoilt(given[0]).isnan().sum())
        if int(where.sum()) != expected:
            where &= ~out.isnan()
        elif not alone:
            where, expected = where & out.isnan(), int((where & out.isnan()).sum())
        if int(where.sum()) == expected:
            if any(_share_memory(out, t) for t in given):  # a view, into which may be written, or written into
                out.masked_fill_(where, 0.0)
            else:
                out = out.masked_fill(where, 0.0)
            self.zeroed[id(out)] = weakref.ref(out), where
        return out

    def _is_zeroed(self, leaf: Any) -> bool:
        return id(leaf) in self.zeroed and self.zeroed[id(leaf)][0]() is leaf

    def _spoilt(self, leaf: Any) -> Any:
        if not self._is_zeroed(leaf):
            return leaf
        where = self.zeroed[id(leaf)][1]
        if isinstance(where, torch.Tensor):
            return leaf.masked_fill(where, float("nan"))
        return _filled(leaf.clone(), where, float("nan"))

    def _note_rounded(self, args: Any, out: torch.Tensor, declared: Function | None) -> None:
        """Remember what a call made whole numbers of; where it had been rounded before, what that was."""
        read = [leaf for leaf in args if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        if declared is not None and declared.rounds:
            self.unrounded[id(out)] = out, read  # held, so that no other tensor has its id
        elif read and not (out.is_floating_point() or out.is_complex()):
            self.rounded = [t for each in read for t in self.unrounded.get(id(each), (each, [each]))[1]]

    def _note_written(self, given: Any, converted: Any) -> None:
        """A function that writes wrote into what was converted for it, which is read from now on."""
        places = [(given[0][0], converted[0][0])] if given[0] else []
        places.append((given[1].get("out"), converted[1].get("out")))
        for leaf, wide in places:
            if isinstance(leaf, torch.Tensor) and wide is not leaf:
                self.written[id(leaf)] = leaf, wide  # the leaf is held, so that no other tensor has its id

    def widen(self, leaf: Any) -> Any:
        """A tensor of a narrower dtype, as new ones are, in the wide one."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.is_complex():
            return leaf.to(self.complex)
        return leaf.to(self.dtype) if leaf.is_floating_point() else leaf

    def convert(self, leaf: Any) -> Any:
        """A floating-point tensor in the wide dtype, a weight with its rows zeroed; a dtype as the wide one."""
        if isinstance(leaf, torch.dtype):
            return self.complex if leaf.is_complex else self.dtype if leaf.is_floating_point else leaf
        if not isinstance(leaf, torch.Tensor):
            return leaf
        known = self.written.get(id(leaf))
        if known is not None:
            return known[1]
        name, value = self.names.get(id(leaf)), leaf
        if name is not None and (leaf.is_floating_point() or leaf.dtype == torch.bool):
            value = _value(name, leaf, self.draw, self.nudge, self.dtype)
        wide = self.widen(value)
        if wide is not leaf and id(leaf) in self.weights:
            self.converted.add(address_of(wide))
        rows = self.rows.get(id(leaf))
        if rows is not None:
            wide = wide.clone() if wide is leaf else wide
            _filled(wide, rows, self.fill)
            if not self.fill:
                self.zeroed[id(wide)] = weakref.ref(wide), rows
        return wide


def _with_left_out(name: str, given: list[torch.Tensor], out: Any) -> Any:
    """What a call gave that chooses by truth values, no number wherever one of those that it chose from is none.

    Raises:
        ValueError: it wrote over numbers, or gave a part of them.
    """
    if not any(t.dtype == torch.bool for t in given):
        return out
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        raise ValueError(f"{name} writes by truth values")
    if isinstance(out, torch.Tensor) and out.is_floating_point():
        for t in given:
            if t.is_floating_point():
                out = out + 0 * t
    return out


NUDGE = {torch.float64: 2.0**-40, torch.float32: 2.0**-16}
"""By how much weights are changed to see what outputs owe to rounding: a few thousand times the last bit."""


def _nudged(value: torch.Tensor, name: str, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    signs = torch.rand(value.shape, generator=generator, device="cpu").round_().mul_(2).sub_(1)
    return value.to(dtype) * (1 + NUDGE[dtype] * signs.to(value.device, dtype))


ROUNDING = 2.0**-33
"""Of the largest number there is: ten times less than a certificate tolerates, a thousand times what rounding does."""


def _rounded(leaf: Any) -> Any:
    """Numbers that are to be put in order, without their last bits: these would decide between equals."""
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or not leaf.numel():
        return leaf
    largest = float(leaf.abs().nan_to_num(0.0, 0.0, 0.0).max())
    step = 2.0 ** math.frexp(largest)[1] * ROUNDING  # a power of two, the same for numbers that are nearly the same
    return leaf.div(step).round_().mul_(step)


_VIEWS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
_NARROWING = frozenset({torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16})
_CONVOLUTIONS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d})


def _convolve(
    func: Any,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """A convolution as a sum over slices of its channels, where float64 on the CPU would unfold much at once.

    There, a depthwise one is a convolution per channel, each started on all threads. As a sum over the places of its
    kernel it takes no longer, and a small part of the time where other processes hold up one of the threads.
    """
    sizes = (stride, padding, dilation)
    each = all(type(size) is tuple and len(size) == input.dim() - 2 for size in sizes)
    if input.device.type == "cpu" and each and 1 < groups == input.shape[1] == weight.shape[0]:
        return _depthwise(input, weight, bias, *sizes)
    columns = 8 * input.numel() * math.prod(weight.shape[2:])
    slices = min(math.ceil(columns / COLUMNS), weight.shape[1])
    if slices <= 1 or groups > 1 or input.device.type != "cpu" or input.dim() != weight.dim():
        return func(input, weight, bias, stride, padding, dilation, groups)
    first, *rest = zip(input.chunk(slices, 1), weight.chunk(slices, 1), strict=True)
    result: torch.Tensor = func(*first, bias, stride, padding, dilation)
    for x, w in rest:
        result += func(x, w, None, stride, padding, dilation)
    return result


def _depthwise(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Any, padding: Any, dilation: Any
) -> torch.Tensor:
    """A convolution of every channel with a kernel of its own, as a sum over the places of the kernel.

    Products are rounded before they are added, so that a channel gives the same bits beside whatever others: where
    a detector's scores are equal, their order hangs on the last bit.

    Args:
        input: (N, C, ...).
        weight: (C, 1, ...).
        bias: (C) or None.
        stride, padding, dilation: one number per dim of the kernel.
    """
    input = nn.functional.pad(input, [size for size in reversed(padding) for _ in range(2)])
    kernel, per_channel = weight.shape[2:], (-1, *[1] * len(stride))
    last = [n - d * (k - 1) - 1 for n, k, d in zip(input.shape[2:], kernel, dilation, strict=True)]
    sides = [n // s + 1 for n, s in zip(last, stride, strict=True)]
    result = input.new_zeros((*input.shape[:2], *sides))
    product = torch.empty_like(result)
    places: Any = itertools.product(*map(range, kernel))
    for place in places:
        starts = [k * d for k, d in zip(place, dilation, strict=True)]
        window: Any = (..., *(slice(a, a + n + 1, s) for a, n, s in zip(starts, last, stride, strict=True)))
        result += torch.mul(input[window], weight[(..., *place)].view(per_channel), out=product)
    return result if bias is None else result.add_(bias.view(per_channel))

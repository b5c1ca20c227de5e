"""One recorded forward: every ATen call with its tensors by identity, its literals and its module."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from allocator import adapters
from allocator.errors import TraceError
from allocator.modules import modules_of, skeleton, tensor_names
from allocator.tracing import meta_kernels as shortcuts
from allocator.tracing.inputs import Inputs
from allocator.tracing.operators import Operator, operator_of
from allocator.tracing.value_sized import largest

# Functions that fvcore counts as a whole, or whose meaning is lost in their parts.
COMPOSITES = frozenset(
    {
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool2d",
        "chain_matmul",
        "chunk",
        "einsum",
        "inner",
        "instance_norm",
        "interpolate",
        "linalg_matrix_power",
        "linalg_multi_dot",
        "matmul",
        "matrix_power",
        "multi_head_attention_forward",
        "rmatmul",
        "scaled_dot_product_attention",
        "tensor_split",
        "tensordot",
    }
)


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor in a recorded call: an index into `Trace.values`."""

    index: int


@dataclass(slots=True)
class Value:
    """A tensor that was seen.

    Attributes:
        shape: its sizes.
        dtype: its dtype.
        name: the name of the parameter or buffer it is, or None for an activation.
        base: the value whose memory it is a view of, or None.
        literal: its numbers, where the forward wrote them down (`torch.tensor(8)`).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str | None = None
    base: int | None = None
    literal: tuple[Any, ...] = ()


@dataclass(slots=True)
class Call:
    """A call seen above the dispatcher, kept because it counts or flows as one."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...] = ()


@dataclass(slots=True)
class Op:
    """One ATen call.

    Attributes:
        index: position in `Trace.ops`.
        target: the overload, such as `aten.convolution.default`.
        args, kwargs: as called, with a `Ref` in place of every tensor.
        reads: indices into `Trace.values` of all tensors among them, in order.
        outputs: indices into `Trace.values`.
        module: path of the innermost module that was running, "" for the model itself.
        call: the composite call it is part of, or None.
        operator: what torch says of `target`.
        name: operator name without namespace or overload, such as `convolution`.
    """

    index: int
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    outputs: tuple[int, ...]
    module: str
    call: Call | None
    operator: Operator = field(init=False, repr=False)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.operator = operator_of(self.target)
        self.name = self.operator.name

    def arg(self, name: str) -> Any:
        """An argument by its name in the schema, or its default."""
        if name in self.kwargs:
            return self.kwargs[name]
        position, default = self.operator.arguments.get(name, (len(self.args), None))
        return self.args[position] if position < len(self.args) else default

    def inputs(self) -> tuple[int, ...]:
        """Indices of all tensors it read, in order."""
        return self.reads

    def writes(self) -> bool:
        """Whether it changes one of its inputs in place."""
        return self.operator.writes

    def takes_apart(self) -> bool:
        """Whether it gives views of its input in a list."""
        split = self.call is not None and self.call.name == "tensor_split" and bool(self.reads)
        return split or self.operator.lists_views

    def __str__(self) -> str:
        return f"{self.target} in {self.module or 'the model'}"


@dataclass(slots=True)
class Trace:
    """A recorded forward.

    Attributes:
        ops: all ATen calls in order.
        values: all tensors; `outputs` and `Op.outputs` index into it.
        outputs: tensors that the model returned.
        calls: composite calls in order.
        modules: by path those of the model that was given; a copy of them ran, and is gone.
        mode: "meta", "fake" or "real": what the tensors were.
        training: whether the model was in train mode.
    """

    ops: list[Op]
    values: list[Value]
    outputs: list[int]
    calls: list[Call]
    modules: dict[str, nn.Module] = field(repr=False)
    mode: str
    training: bool = False

    def live(self, gone: Collection[int] = frozenset()) -> list[Op]:
        """Calls that the outputs depend on, in order; those that only serve values in `gone` do not count.

        As torch's own tracer has it, whose graphs fvcore counts: a write into what the model was given, or into
        a tensor that a live call takes apart into a list, is never lost.
        """
        lists = [op for op in self.ops if op.takes_apart()]
        shared = set(range(len(self.values))).difference(*(set(op.outputs) - set(op.reads) for op in self.ops))
        while True:
            live = self._needed(gone, shared | {self.root(op.reads[0]) for op in lists})
            indices = {op.index for op in live}
            still = [op for op in lists if op.index in indices]
            if len(still) == len(lists):
                return live
            lists = still

    def _needed(self, gone: Collection[int], shared: set[int]) -> list[Op]:
        wanted = set(self.outputs)
        memory = shared | {self.root(i) for i in wanted}
        live = []
        for op in reversed(self.ops):
            written = op.writes() and any(self.root(i) in memory for i in op.outputs)
            if (written or not wanted.isdisjoint(op.outputs)) and not any(i in gone for i in op.outputs):
                live.append(op)
                wanted.update(i for i in op.inputs() if i not in gone)
                memory.update(self.root(i) for i in op.inputs() if i not in gone)
        return live[::-1]

    def root(self, index: int) -> int:
        """The value that owns a value's memory, so that a write into a view is a write into what it views."""
        base = self.values[index].base
        return index if base is None else base

    def __str__(self) -> str:
        lines = [f"{op.index:5d} {op.target} {[self.values[i].shape for i in op.outputs]}" for op in self.ops]
        return "\n".join(lines)


class ForwardError(Exception):
    """A recorded forward raised; carries the calls that had been made until then, without one that raised."""

    def __init__(self, cause: Exception, module: str, partial: Trace):
        super().__init__(str(cause))
        self.cause, self.module, self.partial = cause, module, partial


def trace_forward(model: nn.Module, inputs: Inputs, *, training: bool = False) -> Trace:
    """Record one forward of a copy of `model`, on meta tensors where that can be done.

    Args:
        model: any module; neither run nor changed.
        inputs: example inputs.
        training: record in train mode instead of eval mode; then only on meta tensors.

    Raises:
        TraceError: the forward raised on meta, fake and real tensors alike.
    """
    modes = ["meta"] if training else ["meta", "fake", "real"]
    errors = []
    for mode in modes:
        try:
            return record(model, inputs, mode, training=training)
        except ForwardError as error:
            errors.append(error)
    last = errors[-1]
    where = f"in {last.module}" if last.module else "in the model's own forward"
    raise TraceError(
        f"the forward raised {type(last.cause).__name__} {where} with {inputs.describe()}: {last.cause}; "
        "check that model(*example_inputs) runs, or pass other example_inputs"
    ) from last.cause


def record(
    model: nn.Module, inputs: Inputs, mode: str = "meta", *, training: bool = False, copied: bool = False
) -> Trace:
    """Record one forward in the given mode; `ForwardError` if it raises.

    Args:
        model: any module; a copy of it runs, unless `copied` says that it is one, in this mode, to be used up.
        inputs: example inputs.
        mode: "meta", "fake" or "real".
        training: record in train mode.
        copied: run `model` itself.
    """
    with contextlib.ExitStack() as stack:
        convert = _converter(mode, stack)
        running = model if copied else skeleton(model, convert)
        args, kwargs = tree_map(
            lambda leaf: convert("", leaf) if isinstance(leaf, torch.Tensor) else leaf,
            (inputs.batch(2 if training else 1)),
        )
        recorder = _Recorder(running)
        if any(module.training is not training for module in recorder.modules.values()):
            running.train(training)
        given = recorder.modules if copied else modules_of(model)
        stack.enter_context(torch.no_grad())
        if mode != "real":
            stack.enter_context(adapters.while_tracing())
        stack.enter_context(recorder.following())
        stack.enter_context(_Functions(recorder))
        stack.enter_context(recorder)
        try:
            output = running(*args, **kwargs)
        except Exception as error:
            recorder.drop_unfinished()
            partial = recorder.compact(None, given, mode, training)
            raise ForwardError(error, recorder.path, partial) from error
    return recorder.compact(output, given, mode, training)


def _converter(mode: str, stack: contextlib.ExitStack) -> Callable[[str, torch.Tensor], torch.Tensor]:
    if mode == "meta":
        return lambda _, t: torch.empty_like(t, device="meta")
    if mode == "fake":
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        stack.enter_context(fake)
        return lambda _, t: fake.from_tensor(t.detach())
    return lambda _, t: t if isinstance(t, nn.Parameter) else t.clone()


# Fake tensors ask each other where they lie; that reads no values.
_DEVICE = torch.ops.prim.device.default


# They make a tensor of numbers that the forward wrote down.
_WRITTEN_DOWN = frozenset({torch.tensor, torch.as_tensor, torch.Tensor.new_tensor})


class _Recorder(TorchDispatchMode):
    """Collects raw calls; `compact` turns them into a `Trace` once the forward is over."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.raw: list[tuple[Any, Any, Any, Any, str, Call | None]] = []
        self.before: dict[int, list[tuple[int, ...]]] = {}
        self.literals: dict[int, tuple[torch.Tensor, tuple[Any, ...]]] = {}
        self.calls: list[Call] = []
        self.call: Call | None = None
        self.paused = False
        self.stack: list[str] = [""]
        self.modules = modules_of(model)

    @property
    def path(self) -> str:
        return self.stack[-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused or func is _DEVICE:
            return func(*args, **(kwargs or {}))
        return self.note(func, args, kwargs or {}, largest(func) or shortcuts.run)

    def note(self, target: Any, args: Any, kwargs: Any, run: Callable[[Any, Any, Any], Any]) -> Any:
        """Record a call to `target`, entered before `run` makes it, so that calls within it come later."""
        entry = len(self.raw)
        if operator_of(target).reshapes:
            self.before.setdefault(id(args[0]), []).append(tuple(args[0].shape))
        self.raw.append((target, args, kwargs, None, self.stack[-1], self.call))
        out = run(target, args, kwargs)
        self.raw[entry] = (target, args, kwargs, out, self.stack[-1], self.call)
        return out

    def drop_unfinished(self) -> None:
        """Forget the last call if it gave nothing, as one that raised."""
        if self.raw and self.raw[-1][3] is None:
            self.raw.pop()

    def whole(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a call without recording its parts."""
        self.paused = True
        try:
            return shortcuts.run(target, args, kwargs)
        finally:
            self.paused = False

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Note which module runs: each is called as one that was compiled in place, which costs less than hooks do."""
        for path, module in self.modules.items():
            vars(module)["_compiled_call_impl"] = self._noting(path, module)
        try:
            yield
        finally:
            for module in self.modules.values():
                del vars(module)["_compiled_call_impl"]

    def _noting(self, path: str, module: nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            depth = len(self.stack)
            self.stack.append(path)
            out = module._call_impl(*args, **kwargs)
            del self.stack[depth:]  # with those in it that raised what it caught
            return out

        return call

    def compact(self, output: Any, modules: dict[str, nn.Module], mode: str, training: bool) -> Trace:
        names = {id(tensor): name for name, tensor in tensor_names(self.model, self.modules).items()}
        values: list[Value] = []
        index: dict[int, int] = {}

        read: list[int] = []

        def ref(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            known = index.get(id(leaf))
            if known is None:
                known = index[id(leaf)] = len(values)
                shape = (self.before.get(id(leaf)) or [_shape(leaf)])[0]
                _, literal = self.literals.get(id(leaf), (leaf, ()))
                values.append(Value(shape, leaf.dtype, names.get(id(leaf)), literal=literal))
            read.append(known)
            return Ref(known)

        def outputs(tree: Any) -> tuple[int, ...]:
            leaves = [tree] if isinstance(tree, torch.Tensor) else tree_flatten(tree)[0]
            return tuple([ref(leaf).index for leaf in leaves if isinstance(leaf, torch.Tensor)])

        for composite in self.calls:
            composite.args, composite.kwargs = _replace(composite.args, ref), _replace(composite.kwargs, ref)
            composite.outputs = outputs(composite.outputs)
        ops = []
        for i, (func, args, kwargs, out, module, call) in enumerate(self.raw):
            reshaped = id(args[0]) if operator_of(func).reshapes else None
            read.clear()
            args, kwargs = _replace(args, ref), _replace(kwargs, ref)
            reads = tuple(read)
            if reshaped is not None:
                self.before[reshaped].pop(0)
                del index[reshaped]
            ops.append(Op(i, func, args, kwargs, reads, outputs(out), module, call))
            _note_views(ops[-1], values)
        returned = list(outputs(tensors_in(output)))
        return Trace(ops, values, returned, self.calls, modules, mode, training)


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Sizes of a tensor; none for a nested one, which has no dims that channels could be followed along."""
    return () if tensor.is_nested else tuple(tensor.shape)


class _Functions(TorchFunctionMode):
    """Notes which ATen calls belong to one composite function."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = None if self.recorder.paused else shortcuts.WHOLE.get(func)
        whole = None if known is None else known(*args, **kwargs)
        if whole is not None:
            return self.recorder.note(*whole, {}, self.recorder.whole)
        name = _composite(func)
        if name is None or self.recorder.call is not None:
            out = func(*args, **kwargs)
            if func in _WRITTEN_DOWN:
                numbers = [leaf for leaf in tree_flatten((args, kwargs))[0] if type(leaf) in _LITERALS]
                self.recorder.literals[id(out)] = out, tuple(numbers)  # held, so that no other tensor has its id
            return out
        call = Call(name, args, kwargs)
        self.recorder.calls.append(call)
        self.recorder.call = call
        try:
            out = func(*args, **kwargs)
        finally:
            self.recorder.call = None
        call.outputs = out
        return out


@functools.lru_cache(maxsize=1024)
def _composite(func: Any) -> str | None:
    name = getattr(func, "__name__", "").strip("_")
    return name if name in COMPOSITES else None


def _replace(tree: Any, ref: Callable[[Any], Any]) -> Any:
    """`tree_map` for the few containers that ATen arguments use; several times faster."""
    if type(tree) in _LITERALS:
        return tree
    if isinstance(tree, (list, tuple)):
        return tuple([item if type(item) in _LITERALS else _replace(item, ref) for item in tree])
    if isinstance(tree, dict):
        return {key: _replace(item, ref) for key, item in tree.items()}
    return ref(tree)


_LITERALS = frozenset({int, float, bool, str, type(None)})


def _note_views(op: Op, values: list[Value]) -> None:
    """Where a call gives views of its first tensor, say so in their values."""
    if not op.reads or not op.operator.gives_views:
        return
    source = op.reads[0]
    base = source if values[source].base is None else values[source].base
    for index in op.outputs:
        if index != source and values[index].name is None:
            values[index].base = base


def tensors_in(output: Any) -> list[torch.Tensor]:
    """Tensors in a model's output, through containers, dataclasses and plain objects."""
    found: list[torch.Tensor] = []
    queue = [output]
    while queue:
        item = queue.pop(0)
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, dict):
            queue.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            queue.extend(item)
        elif hasattr(item, "__dict__") and not isinstance(item, (nn.Module, type)):
            queue.extend(vars(item).values())
    return found

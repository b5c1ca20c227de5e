"""Recording one forward: every ATen call with its tensors by identity, its literals and its module."""

from __future__ import annotations

import contextlib
import functools
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from allocator import adapters
from allocator.errors import TraceError, text_of
from allocator.modules import modules_of, on_a_copy, tensor_names
from allocator.torch_private import (
    LITERALS,
    TorchDispatchMode,
    call_as_usual,
    call_by,
    call_by_itself,
    is_transformed,
    past_dispatch,
    tree_flatten,
)
from allocator.tracing import meta_kernels
from allocator.tracing.calls import Call, Op, Ref, Trace, Value
from allocator.tracing.exchange import Exchange, exchanged
from allocator.tracing.inputs import Inputs
from allocator.tracing.isolation import apart, undisturbed
from allocator.tracing.journal import unnoted
from allocator.tracing.modes import converter
from allocator.tracing.operators import AS_ONE_CALL, FUNCTIONS, Function, operator_of
from allocator.tracing.outputs import UnseenOutputError, as_data, require_seen, said_in, tensors_in
from allocator.tracing.seeds import Seeds
from allocator.tracing.value_sized import without_values


class ForwardError(Exception):
    """A recorded forward raised; carries the calls that had been made until then, without one that raised."""

    def __init__(self, cause: Exception, module: str, partial: Trace):
        super().__init__(text_of(cause))
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
    if isinstance(last.cause, UnseenOutputError):
        raise TraceError(str(last.cause)) from last.cause
    where = f"in {last.module}" if last.module else "in the model's own forward"
    given = _OF_FUNCTIONS.search(text_of(last.cause))
    if given is not None:
        raise TraceError(
            f"the forward calls torch's {given[1]} {where}, which runs functions that it is given, and isn't followed: "
            "write the branch or the loop in Python, or compute all branches and choose with torch.where"
        ) from last.cause
    raise TraceError(
        f"the forward raised {type(last.cause).__name__} {where} with {inputs.describe()}: {text_of(last.cause)}; "
        "check that model(*example_inputs) runs, or pass other example_inputs"
    ) from last.cause


_OF_FUNCTIONS = re.compile(r"no rule registered for HigherOrderOperator (\w+)")
"""What torch says of an operator that takes functions, where a mode is on that does not."""


def record(
    model: nn.Module,
    inputs: Inputs,
    mode: str = "meta",
    *,
    training: bool = False,
    copied: bool = False,
    exchanges: tuple[Exchange, ...] = (),
) -> Trace:
    """Record one forward in the given mode; `ForwardError` if it raises.

    Args:
        model: any module; a copy of it runs, unless `copied` says that it is one, in this mode, to be used up.
        inputs: example inputs.
        mode: "meta", "fake" or "real".
        training: record in train mode.
        copied: run `model` itself.
        exchanges: members of its modules that stand in each other's place meanwhile.
    """
    with contextlib.ExitStack() as stack:
        convert = converter(model, mode, stack)

        def forward(running: nn.Module) -> _Ran:
            converted = inputs.map(lambda t: convert("", t))
            return _run(model, running, inputs, converted, mode, exchanges, training=training)

        made: dict[str, torch.Tensor] = {}

        def noted(name: str, tensor: torch.Tensor) -> torch.Tensor:
            made[name] = convert(name, tensor)
            return made[name]

        ran = forward(model) if copied else on_a_copy(model, noted if mode == "real" else convert, forward)
    if ran.raised is not None:
        ran.recorder.drop_unfinished()
        partial = ran.recorder.compact(None, ran.modules, mode, training, unfinished=True)
        partial.exchanged = exchanges
        raise ForwardError(ran.raised, ran.recorder.path, partial) from ran.raised
    trace = ran.recorder.compact(ran.output, ran.modules, mode, training)
    trace.exchanged = exchanges
    own = tensor_names(model, ran.modules) if made else {}
    trace.by_value.update(name for name, each in own.items() if name in made and not torch.equal(made[name], each))
    return trace


class _Ran(NamedTuple):
    """A forward that is over: who recorded it, what it gave or raised, and the modules of the model that was given."""

    recorder: _Recorder
    output: Any
    raised: Exception | None
    modules: dict[str, nn.Module]


def _run(
    model: nn.Module,
    running: nn.Module,
    inputs: Inputs,
    converted: Inputs,
    mode: str,
    exchanges: tuple[Exchange, ...],
    *,
    training: bool,
) -> _Ran:
    """Run a copy of `model`, or itself where it is one, on inputs as it takes them."""
    recorder = _Recorder(running, inputs, mode)
    adapters.take_any_width(recorder.modules)
    for module in recorder.modules.values():
        if module.training is not training:
            module.training = training
    itself = running is model
    modules = recorder.modules if itself else modules_of(model)
    output: Any = None
    raised: Exception | None = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(undisturbed(model, modules, itself=itself))
        if mode != "real":
            stack.enter_context(adapters.while_tracing())
        stack.enter_context(recorder.following())
        stack.enter_context(exchanged(recorder.modules, exchanges))
        stack.enter_context(_Functions(recorder))
        stack.enter_context(recorder)
        try:
            output = apart(running, *converted.args, **converted.kwargs)
            require_seen(output)
        except SystemExit as gives_up:  # which must not end the caller's process
            raised = RuntimeError(f"the forward exits ({text_of(gives_up)})")
        except Exception as error:
            raised = error
    return _Ran(recorder, output, raised, modules)


def record_again(model: nn.Module, trace: Trace, *, copied: bool = False) -> Trace:
    """Record the forward of a trace once more, of the same or another model; `ForwardError` if it raises."""
    exchanges = trace.exchanged
    return record(model, trace.inputs, trace.mode, training=trace.training, copied=copied, exchanges=exchanges)


# Fake tensors ask each other where they lie; that reads no values.
_DEVICE = torch.ops.prim.device.default


# They make a tensor of numbers that the forward wrote down.
_WRITTEN_DOWN = frozenset({torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor})
_MOST_NUMBERS = 64  # of a tensor, that are compared one by one
# They give a tensor's numbers to what is not torch.
_LEAVING = frozenset({torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__dlpack__})
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class _Recorder(TorchDispatchMode):
    """Collects raw calls; `compact` turns them into a `Trace` once the forward is over."""

    def __init__(self, model: nn.Module, inputs: Inputs, mode: str) -> None:
        super().__init__()
        self.model, self.inputs, self.mode = model, inputs, mode
        self.raw: list[tuple[Any, Any, Any, Any, str, Call | None]] = []
        self.seeds, self.seeded = Seeds(), set[int]()
        self.before: dict[int, list[tuple[int, ...]]] = {}
        self.literals: dict[int, tuple[torch.Tensor, tuple[Any, ...]]] = {}
        self.calls: list[Call] = []
        self.call: Call | None = None
        self.left: list[torch.Tensor] = []
        self.paused = False
        self.stack: list[str] = [""]
        self.modules = modules_of(model)
        self.tensors = tensor_names(model, self.modules)

    @property
    def path(self) -> str:
        return self.stack[-1]

    @unnoted
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused or func is _DEVICE:
            return func(*args, **(kwargs or {}))
        return self.note(func, args, kwargs or {}, operator_of(func).declared.largest or meta_kernels.run)

    def note(self, target: Any, args: Any, kwargs: Any, run: Callable[[Any, Any, Any], Any]) -> Any:
        """Record a call to `target`, entered before `run` makes it, so that calls within it come later."""
        entry = len(self.raw)
        if operator_of(target).reshapes:
            self.before.setdefault(id(args[0]), []).append(tuple(args[0].shape))
        self.raw.append((target, args, kwargs, None, self.stack[-1], self.call))
        own = operator_of(target).draws and self.seeds.is_own(operator_of(target).given(args, kwargs))
        if own:
            self.seeded.add(entry)
        out = run(target, args, kwargs)
        if operator_of(target).draws and not own:
            self.seeds.drew()
        self.raw[entry] = (target, args, kwargs, out, self.stack[-1], self.call)
        return out

    def drop_unfinished(self) -> None:
        """Forget the last call if it gave nothing, as one that raised."""
        if self.raw and self.raw[-1][3] is None:
            self.raw.pop()

    def whole(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a call without recording its parts."""
        if self.mode == "meta":
            with past_dispatch():
                return meta_kernels.run(target, args, kwargs)
        self.paused = True
        try:
            return meta_kernels.run(target, args, kwargs)
        finally:
            self.paused = False

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Note which module runs: each is called as one that was compiled in place, which costs less than hooks do."""
        for path, module in self.modules.items():
            call_by(module, self._noting(path, module))
        try:
            yield
        finally:
            for module in self.modules.values():
                call_by_itself(module)

    def _noting(self, path: str, module: nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            depth = len(self.stack)
            self.stack.append(path)
            out = call_as_usual(module, *args, **kwargs)
            del self.stack[depth:]  # with those in it that raised what it caught
            return out

        return call

    def _names(self) -> dict[int, str]:
        """Of the model's tensors as they were; one that the forward puts in the place of another is computed."""
        added = {name: t for name, t in tensor_names(self.model, self.modules).items() if name not in self.tensors}
        return {id(tensor): name for name, tensor in {**added, **self.tensors}.items()}

    def compact(
        self, output: Any, modules: dict[str, nn.Module], mode: str, training: bool, *, unfinished: bool = False
    ) -> Trace:
        known = _Known(self._names(), self.before, {key: numbers for key, (_, numbers) in self.literals.items()}, mode)
        ops: list[Op] = []
        current, waiting = None, {id(call): call for call in self.calls}
        for i, (func, args, kwargs, out, module, call) in enumerate(self.raw):
            if call is not current:
                _finish(current, known)
                current = call
                _begin(waiting.pop(id(call), None), known)
            reshaped = id(args[0]) if operator_of(func).reshapes else None
            known.read.clear()
            args, kwargs = _replace(args, known.ref), _replace(kwargs, known.ref)
            reads = tuple(known.read)
            if reshaped is not None:
                known.forget(reshaped)
            ops.append(Op(i, func, args, kwargs, reads, known.made(out), module, call, i in self.seeded))
            _note_views(ops[-1], known.values)
        _finish(current, known)
        for call in waiting.values():
            _begin(call, known)
            _finish(call, known)
        returned, left = known.refs(tensors_in(output)), known.refs(self.left)
        said = tuple(map(as_data, said_in(output)))
        return Trace(
            ops, known.values, returned, self.calls, modules, mode, training, self.inputs, unfinished, left, said
        )


def _begin(call: Call | None, known: _Known) -> None:
    if call is not None:
        call.args, call.kwargs = _replace(call.args, known.ref), _replace(call.kwargs, known.ref)


def _finish(call: Call | None, known: _Known) -> None:
    if call is not None:
        call.outputs = known.made(call.outputs)


class _Known:
    """The tensors of a recorded forward, by the objects that they were seen as.

    Attributes:
        values: all of them so far.
        read: indices of those that were asked for, to be cleared by whoever collects them.
    """

    def __init__(
        self,
        names: dict[int, str],
        before: dict[int, list[tuple[int, ...]]],
        literals: dict[int, tuple[Any, ...]],
        mode: str,
    ) -> None:
        self.values: list[Value] = []
        self.read: list[int] = []
        self._names, self._before, self._literals, self._mode = names, before, literals, mode
        self._index: dict[int, Ref] = {}
        self._leaves: list[torch.Tensor] = []
        self._places: dict[tuple[Any, ...], Ref] = {}
        self._placed = 0

    def ref(self, leaf: Any) -> Any:
        """Of a tensor that is read, which one it is; anything else as it is."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        known = self._index.get(id(leaf)) or self._same_memory(leaf) or self._new(leaf)
        self.read.append(known.index)
        return known

    def refs(self, leaves: list[torch.Tensor]) -> list[int]:
        """Of tensors that were returned, which ones they are."""
        return [self.ref(leaf).index for leaf in leaves]

    def made(self, tree: Any) -> tuple[int, ...]:
        """Of the tensors that a call gave, which ones they are."""
        leaves = [tree] if isinstance(tree, torch.Tensor) else tree_flatten(tree)[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return tuple([(self._index.get(id(leaf)) or self._new(leaf)).index for leaf in tensors])

    def forget(self, key: int) -> None:
        """An object was given another shape: it is another tensor from now on."""
        self._before[key].pop(0)
        del self._index[key]

    def _new(self, leaf: torch.Tensor) -> Ref:
        known = self._index[id(leaf)] = Ref(len(self.values))
        shape = (self._before.get(id(leaf)) or [_shape(leaf)])[0]
        literal = self._literals[id(leaf)] if id(leaf) in self._literals else _numbers(leaf, self._mode)
        self.values.append(Value(shape, leaf.dtype, self._names.get(id(leaf)), literal=literal))
        self._leaves.append(leaf)
        return known

    def _same_memory(self, leaf: torch.Tensor) -> Ref | None:
        """Of an object that no call gave, such as `as_subclass` and `nn.Parameter` make, the tensor that it is."""
        if id(leaf) in self._names:
            return None
        for index in range(self._placed, len(self._leaves)):
            self._places[_place(self._leaves[index])] = Ref(index)
        self._placed = len(self._leaves)
        found = self._places.get(_place(leaf))
        if found is not None:
            self._index[id(leaf)] = found
        return found


def _numbers(tensor: torch.Tensor, mode: str) -> tuple[Any, ...]:
    """What a forward without values reads of a tensor that has some: numbers that it made, however it did.

    What is repeated counts once, however often: all, or along a dim that was expanded. Of many others a checksum.
    """
    if mode == "real" or without_values(tensor) or tensor.layout is not torch.strided:
        return ()
    for dim, stride in enumerate(tensor.stride()):
        tensor = tensor.detach().narrow(dim, 0, 1) if stride == 0 and tensor.shape[dim] else tensor
    numbers = tensor.detach().cpu().reshape(-1)
    if len(numbers) > 1 and bool((numbers == numbers[0]).all()):
        return tuple(numbers[:1].tolist())
    if len(numbers) <= _MOST_NUMBERS:
        return tuple(numbers.tolist())
    return (zlib.crc32(numbers.contiguous().view(torch.uint8).numpy().tobytes()),)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory, and how; its own identity where it has none that can be named."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return (id(tensor),)
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Sizes of a tensor; none for a nested one, which has no dims that channels could be followed along."""
    return () if tensor.is_nested else tuple(tensor.shape)


class _Functions(TorchFunctionMode):
    """Notes which ATen calls belong to one composite function."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    @unnoted
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LEAVING and self.recorder.mode == "real":
            self.recorder.left.append(args[0])
        if func == _DATA:  # the same memory, by a way that the dispatcher does not see
            return args[0].detach()
        if is_transformed():
            return func(*args, **kwargs)
        known = None if self.recorder.paused else AS_ONE_CALL.get(func)
        whole = None if known is None else known(*args, **kwargs)
        if whole is not None:
            return self.recorder.note(*whole, {}, self.recorder.whole)
        declared = _declared(func)
        if declared is not None and declared.asserts and without_values(args[0]):
            return True
        if declared is None or not declared.whole or self.recorder.call is not None:
            out = func(*args, **kwargs)
            if func in _WRITTEN_DOWN:
                leaves = [getattr(leaf, "tolist", lambda leaf=leaf: leaf)() for leaf in _given(args, kwargs)]
                numbers = [leaf for leaf in tree_flatten(leaves)[0] if type(leaf) in LITERALS]
                self.recorder.literals[id(out)] = out, tuple(numbers)  # held, so that no other tensor has its id
            return out
        call = Call(declared.name, args, kwargs)
        self.recorder.calls.append(call)
        self.recorder.call = call
        try:
            out = (func if declared.in_parts is None else declared.in_parts)(*args, **kwargs)
        finally:
            self.recorder.call = None
        call.outputs = out
        return out


def _given(args: Any, kwargs: Any) -> list[Any]:
    """Numbers, words and arrays of numpy's that a call was given, no tensors."""
    return [leaf for leaf in tree_flatten((args, kwargs))[0] if not isinstance(leaf, torch.Tensor)]


@functools.lru_cache(maxsize=1024)
def _declared(func: Any) -> Function | None:
    return FUNCTIONS.get(getattr(func, "__name__", "").strip("_"))


def _replace(tree: Any, ref: Callable[[Any], Any]) -> Any:
    """`map_arguments` that makes tuples of lists, which the forward may go on to change."""
    if type(tree) in LITERALS:
        return tree
    if isinstance(tree, (list, tuple)):
        return tuple([item if type(item) in LITERALS else _replace(item, ref) for item in tree])
    if isinstance(tree, dict):
        return {key: _replace(item, ref) for key, item in tree.items()}
    return ref(tree)


def _note_views(op: Op, values: list[Value]) -> None:
    """Where a call gives views of its first tensor, say so in their values."""
    if not op.reads or not op.operator.gives_views:
        return
    source = op.reads[0]
    base = source if values[source].base is None else values[source].base
    for index in op.outputs:
        if index not in op.reads and values[index].name is None:
            values[index].base = base

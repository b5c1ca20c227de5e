"""Hand a network on: written as ONNX or as an exported program, run from the file, and held against the module.

The graph that was written is also counted: its convolutions and linear layers have the module's channels, and
cost what fvcore counts in the module.
"""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allocator.arguments import checked
from allocator.cost.fvcore import fvcore_layer_flops
from allocator.disk import PathLike, check_writable, shorten, write_atomically
from allocator.errors import (
    ExportError,
    InputError,
    MissingPackageError,
    UnknownNameError,
    as_given,
    did_you_mean,
    first_line,
    text_of,
)
from allocator.io.onnx_flops import layer_flops
from allocator.logs import ANY, hidden, unwarned
from allocator.model_checks import check_model
from allocator.modules import skeleton, tensor_names
from allocator.rewriting.lineage import led_to
from allocator.torch_private import tree_flatten
from allocator.tracing.inputs import Inputs, as_inputs, inputs_like
from allocator.tracing.operators import operator_of
from allocator.verifying.float64 import run_float64

FORMATS = {"onnx": ".onnx", "pt2": ".pt2"}
BATCHES = (1, 2, 5)
MOST_INPUTS = 1_000_000
"""Of one batch."""
TOLERANCE = 1e-4
# How much further from float64 than the module a file may lie, as it adds up in another order, and what a module may
# round away itself, so that this still says something.
ROUNDINGS, ROUGH = 10, 0.01
NUDGES = 5  # how often what it rounds away is measured

Run = Callable[[Inputs], list[torch.Tensor]]
Written = tuple[Run, "GraphFacts"]


@dataclass(frozen=True)
class GraphFacts:
    """What the written graph says of itself.

    Attributes:
        shapes: of the parameters that kept their names.
        flops: multiply-adds of its convolutions and linear layers for the example inputs.
    """

    shapes: dict[str, tuple[int, ...]]
    flops: int


@dataclass(frozen=True)
class Export:
    """What was written, and how it compares with the module.

    Attributes:
        path, format: of the file.
        batches: the batch sizes it was run with.
        difference: largest difference of an output from the module's, relative to the largest number of its tensor;
            from what the module gives in float64 where a note says what the module itself rounds to.
        layer_flops: multiply-adds of the convolutions and linear layers in the written graph, for the example
            inputs; fvcore's count of the module's is the same, or more where a note says so.
        size: of the file, in bytes.
        notes: what is not as asked, such as a batch size that is fixed.
    """

    path: str
    format: str
    batches: tuple[int, ...]
    difference: float
    layer_flops: int
    size: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


@checked
def export(
    model: Any,
    path: PathLike,
    *,
    to: str | None = None,
    example_inputs: Any = None,
    batches: Sequence[int] = BATCHES,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Export:
    """Write a network as ONNX or as an exported program, run the file, and compare it with the module.

    The network is exported in eval mode with a batch size that is left open. The file appears only if it gave the
    module's outputs.

    Args:
        model: a module, or what ``allocator.allocate`` returned; not changed.
        path: the file to write, ``.onnx`` or ``.pt2``.
        to: "onnx" or "pt2"; None to go by the path.
        example_inputs: as for ``allocate``; None for those that the allocation was made with, or one image.
        batches: batch sizes to compare at.
        tolerance: the largest difference that passes, relative to the largest number of each output tensor. Where
            more of the module's own outputs is rounding, up to ten times as much passes, and a note says so.
        seed: of the inputs that are compared on.

    Raises:
        UnknownNameError: there is no such format; near names are given.
        InputError: `batches` or `tolerance` is out of range.
        MissingPackageError: a package that the format needs is not installed.
        ExportError: torch cannot export the module, or what was written does not do what the module does.
        FileError: the path cannot be written.
    """
    to = format_of(path, to)
    check_writable(path)
    if not 0 < tolerance < math.inf:
        raise InputError(f"tolerance={as_given(tolerance)} is no number above zero, such as {TOLERANCE:g}")
    asked, batches = batches, tuple(batches) if isinstance(batches, (list, tuple, range)) else ()
    if not batches or not all(type(size) is int and 0 < size <= MOST_INPUTS for size in batches):
        raise InputError(f"batches={as_given(asked)} are no whole numbers from 1 to {MOST_INPUTS:,}, such as {BATCHES}")
    network = check_model(model if isinstance(model, nn.Module) else getattr(model, "model", model), values=True)
    _check_dtype(network)
    inputs = _example(network, example_inputs).map(lambda t: t.cpu())
    network = skeleton(network, lambda _, t: t.detach().cpu()).eval()
    # The exporters warn and log about their own insides.
    with hidden(ANY), unwarned(), write_atomically(path) as temporary:
        # A copy is exported, as a forward may keep what it computed in its modules: there that has no values.
        program, fixed = _exported(skeleton(network, lambda _, t: t), inputs)
        sizes = (1,) if fixed else batches
        named = temporary.with_name(temporary.name + FORMATS[to])  # the writers go by the suffix
        try:
            run, facts = _WRITERS[to](program, named, inputs)
            notes = [*fixed, *_check_layers(network, facts, inputs)]
            compared = [_compare(network, run, inputs, size, seed, tolerance) for size in sizes]
            worst = max(compared, key=lambda each: each.apart / each.allowed)
            if not worst.apart <= worst.allowed:
                raise ExportError(f"{path} was not written: its outputs differ from the module's by {worst}")
            notes += [f"batch {n}: {each}" for n, each in zip(sizes, compared, strict=True) if each.rounding]
            named.replace(temporary)
        finally:
            named.unlink(missing_ok=True)
    difference = max(each.apart for each in compared)
    return Export(str(path), to, sizes, difference, facts.flops, Path(path).stat().st_size, tuple(notes))


def format_of(path: PathLike, to: str | None = None) -> str:
    """The format that is meant, by its name or by the path's suffix.

    Raises:
        UnknownNameError: none is; near names are given.
    """
    suffix = Path(path).suffix
    asked = suffix.removeprefix(".") if to is None else to
    if asked not in FORMATS:
        hint = did_you_mean(asked.lower(), FORMATS, cutoff=0.4) or f"there are {' and '.join(FORMATS)}"
        raise UnknownNameError(f"no format {as_given(asked)} to export to; {hint}")
    if suffix != FORMATS[asked]:
        raise UnknownNameError(f"{Path(path).name!r} does not end in {FORMATS[asked]}, as {asked} files do")
    return asked


def _check_dtype(network: nn.Module) -> None:
    for name, tensor in tensor_names(network).items():
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            raise ExportError(
                f"{name} is {tensor.dtype}, which cannot be compared to {TOLERANCE}: export model.float(), and "
                "convert the file with the tools of where it will run"
            )


def _example(network: nn.Module, example_inputs: Any) -> Inputs:
    if example_inputs is None:
        allocation = led_to(network)
        example_inputs = inputs_like(allocation.input_shapes, network) if allocation else None
    return as_inputs(example_inputs, network)


# ------------------------------------------------------------------------------------------ writing


def _exported(network: nn.Module, inputs: Inputs) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The network as a graph of ATen calls, and why its batch size is fixed where it cannot be left open."""
    args, kwargs = inputs.batch(2)  # torch.export takes a size of one for a constant
    try:
        return torch.export.export(network, args, kwargs, dynamic_shapes=_open_batch(network, args, kwargs)), []
    except Exception as dynamic:
        args, kwargs = inputs.batch(1)
        try:
            program = torch.export.export(network, args, kwargs)
        except Exception as error:
            raise ExportError(
                f"torch.export cannot follow {type(network).__name__}: {shorten(text_of(error), 400)}"
            ) from error
        return program, [f"the batch size is fixed, because the network cannot leave it open: {first_line(dynamic)}"]


def _open_batch(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Per argument of the forward, its first dim by one name."""
    batch = torch.export.Dim("batch", min=1)

    def opened(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return {0: batch} if value.dim() else None
        if isinstance(value, (list, tuple)):
            return type(value)(opened(each) for each in value)
        return {key: opened(each) for key, each in value.items()} if isinstance(value, dict) else None

    bound = inspect.signature(network.forward).bind(*args, **kwargs).arguments
    return {name: opened(value) for name, value in bound.items()}


def _write_pt2(program: torch.export.ExportedProgram, path: Path, inputs: Inputs) -> Written:
    from torch.utils.flop_counter import FlopCounterMode  # takes half a second that nothing else needs

    whole = io.BytesIO()  # where the disk is full, torch's own writer to a file ends the process
    torch.export.save(program, whole)
    path.write_bytes(whole.getbuffer())
    module = torch.export.load(path).module()

    def run(given: Inputs) -> list[torch.Tensor]:
        return _tensors(module(*given.args, **given.kwargs))

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(inputs)
    counts = counter.get_flop_counts()["Global"]
    doubled = sum(
        flops for packet, flops in counts.items() if operator_of(packet.default).declared.written_dim is not None
    )
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    return run, GraphFacts(shapes, doubled // 2)  # torch counts a multiply-add as two


def _write_onnx(program: torch.export.ExportedProgram, path: Path, inputs: Inputs) -> Written:
    onnx, runtime = _package("onnx"), _package("onnxruntime")
    _package("onnxscript")
    try:
        written = torch.onnx.export(program, dynamo=True, verbose=False)
        assert written is not None
        written.save(path)
    except OSError:
        raise
    except Exception as error:
        raise ExportError(f"torch.onnx cannot write this network: {shorten(text_of(error), 400)}") from error
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(given: Inputs) -> list[torch.Tensor]:
        values = [tensor.numpy() for tensor in given.tensors()]
        return [torch.from_numpy(value) for value in session.run(None, dict(zip(names, values, strict=True)))]

    graph = onnx.load(path)
    shapes = {each.name: tuple(each.dims) for each in graph.graph.initializer}
    return run, GraphFacts(shapes, layer_flops(graph, [tuple(t.shape) for t in inputs.tensors()]))


_WRITERS: dict[str, Callable[[torch.export.ExportedProgram, Path, Inputs], Written]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
}


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"exporting to ONNX needs {name}, which is not installed: pip install 'neuron-allocator[export]'"
        ) from error


# ------------------------------------------------------------------------------------------ comparing


def _check_layers(network: nn.Module, facts: GraphFacts, inputs: Inputs) -> list[str]:
    """The graph has the module's channels, and costs what fvcore counts in its convolutions and linear layers.

    Returns:
        A note where an exporter left out what has no effect.
    """
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, torch.Tensor) and facts.shapes.get(name, tensor.shape) != tuple(tensor.shape):
            raise ExportError(
                f"nothing was written: {name} has shape {facts.shapes[name]} in the exported graph, and "
                f"{tuple(tensor.shape)} in the module"
            )
    expected = fvcore_layer_flops(network, inputs)
    if facts.flops > expected:
        raise ExportError(
            f"nothing was written: convolutions and linear layers cost {facts.flops:,} FLOPs in the exported graph, "
            f"and {expected:,} in the module"
        )
    left_out = expected - facts.flops
    return [f"the exporter left out {left_out:,} FLOPs of convolutions and linear layers"] if left_out else []


@dataclass(frozen=True)
class _Compared:
    """How far a file's outputs lie from the module's, what passes, and what float32 itself rounds away of these."""

    apart: float
    allowed: float
    rounding: float = 0.0

    def __str__(self) -> str:
        rounds = f"the module itself rounds to {self.rounding:.2g}; " if self.rounding else ""
        return f"{self.apart:.2g} of the largest of a tensor; {rounds}up to {self.allowed:.2g} passes"


def _compare(network: nn.Module, run: Run, inputs: Inputs, size: int, seed: int, tolerance: float) -> _Compared:
    """A file's outputs beside the module's at this batch size; where that is too far, both beside float64's."""
    args, kwargs = inputs.batch(size)
    drawn = Inputs(args, kwargs).noise(seed, torch.device("cpu"), _dtype(inputs))
    with torch.no_grad():
        expected = _tensors(network(*drawn.args, **drawn.kwargs))
        found = run(drawn)
    if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in expected]:
        raise ExportError(
            f"nothing was written: at a batch of {size} the exported graph gives "
            f"{[tuple(t.shape) for t in found]}, the module {[tuple(t.shape) for t in expected]}"
        )
    if not all(t.isfinite().all() for t in expected):
        raise ExportError("the module's own outputs are not finite, so that nothing can be compared: see its weights")
    one, other = ([t.double() for t in each] for each in (expected, found))
    apart = _apart(one, other)
    if apart <= tolerance:
        return _Compared(apart, tolerance)
    exact = run_float64(_InARow(network), drawn)[: len(one)]
    rounding = max(_apart(exact, each) for each in (one, *_nudged(network, drawn, seed)))
    return _Compared(_apart(exact, other), max(tolerance, ROUNDINGS * min(rounding, ROUGH)), rounding)


def _nudged(network: nn.Module, inputs: Inputs, seed: int) -> Iterator[list[torch.Tensor]]:
    """The module's outputs for inputs that differ in their last bit, so that all that follows is rounded otherwise."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return t
        return t * (1 + torch.finfo(t.dtype).eps * (2 * torch.rand(t.shape, generator=generator, dtype=t.dtype) - 1))

    for _ in range(NUDGES):
        near = inputs.map(nudge)
        with torch.no_grad():
            yield [t.double() for t in _tensors(network(*near.args, **near.kwargs))]


class _InARow(nn.Module):
    """A network that gives the tensors of its output in the order in which an exported file gives them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        return _tensors(self.network(*args, **kwargs))


def _apart(reference: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """Largest difference of a number, relative to the largest of its tensor; nan where one is."""
    apart = [torch.zeros(())]
    for a, b in zip(reference, others, strict=True):
        if a.numel():
            apart.append((a - b).abs().max() / (a.abs().max() or 1.0))
    return float(torch.stack([t.double() for t in apart]).max())


def _dtype(inputs: Inputs) -> torch.dtype:
    return next((t.dtype for t in inputs.tensors() if t.is_floating_point()), torch.float32)


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, torch.Tensor)]

"""How long a forward takes, on the device at hand."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from allocator.arguments import checked
from allocator.errors import InputError, TraceError, as_given, text_of
from allocator.logs import ANY, hidden
from allocator.model_checks import check_model
from allocator.modules import for_inference, tensor_names
from allocator.tracing.inputs import Inputs, as_inputs
from allocator.tracing.record import trace_forward

SECONDS = 1.0
MOST_THREADS = 4096
MOST_SECONDS = 1e6
ROUNDS = 5  # so that a machine that stalls once does not decide


@dataclass(frozen=True)
class Latency:
    """The time of one forward in eval mode, without gradients.

    Attributes:
        seconds: the median.
        spread: interquartile range of the measured blocks, in seconds.
        forwards: how many were measured.
        threads: that the CPU's operators may use.
        device: what it ran on.
        inputs: shapes of the inputs.
    """

    seconds: float
    spread: float
    forwards: int
    threads: int
    device: str
    inputs: tuple[tuple[int, ...], ...]


@checked
def latency(
    model: nn.Module, example_inputs: Any = None, *, threads: int | None = None, seconds: float = SECONDS, seed: int = 0
) -> Latency:
    """Measure the forward where the model's parameters lie, with `torch.utils.benchmark`.

    Args:
        model: any module; it is not changed.
        example_inputs: as for `allocate`; their floating-point values are drawn anew.
        threads: for the CPU's operators; None for as many as torch uses now.
        seconds: how long to measure for, at least.
        seed: of the inputs.

    Raises:
        InputError: the inputs do not fit the model, or `threads` or `seconds` is not above zero.
        UnsupportedModelError: the model has no values, or cannot be copied.
        TraceError: its forward raised.
    """
    (measured,) = latencies([model], example_inputs, threads=threads, seconds=seconds, seed=seed)
    return measured


def latencies(
    models: Sequence[nn.Module],
    example_inputs: Any = None,
    *,
    threads: int | None = None,
    seconds: float = SECONDS,
    seed: int = 0,
) -> list[Latency]:
    """Measure several models in turn, so that a machine that slows down slows all of them; as `latency`."""
    with hidden(ANY):  # where CUDA's compiler is installed and no GPU is there, it says so
        from torch.utils.benchmark import Measurement, Timer

    threads = torch.get_num_threads() if threads is None else threads
    if not 1 <= threads <= MOST_THREADS or not 0 < seconds <= MOST_SECONDS:
        raise InputError(
            f"cannot measure with threads={as_given(threads)}, seconds={as_given(seconds)}: both must be above zero, "
            f"and at most {MOST_THREADS:,} and {MOST_SECONDS:,.0f}"
        )
    timers = []
    with torch.no_grad():
        for model in models:
            network, inputs = runnable(model, example_inputs, seed)
            scope = {"network": network, "args": inputs.args, "kwargs": inputs.kwargs}
            timers.append((network, inputs, Timer("network(*args, **kwargs)", globals=scope, num_threads=threads)))
            timers[-1][-1].timeit(1)  # threads are started at the first use of their number
        rounds = []
        for _ in range(ROUNDS):  # in turn, so that whatever else the machine does meets all of them
            rounds.append([timer.blocked_autorange(min_run_time=seconds / ROUNDS) for _, _, timer in timers])
    found = []
    for (network, inputs, _), blocks in zip(timers, zip(*rounds, strict=True), strict=True):
        (merged,) = Measurement.merge(blocks)
        forwards = sum(len(each.times) * each.number_per_run for each in blocks)
        shapes = tuple(tuple(tensor.shape) for tensor in inputs.tensors())
        found.append(Latency(merged.median, merged.iqr, forwards, threads, _device(network), shapes))
    return found


def runnable(model: nn.Module, example_inputs: Any, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """A copy of a model in eval mode that shares its parameters, and inputs drawn for it; it has run once.

    Raises:
        InputError, UnsupportedModelError, TraceError: as for `latency`.
    """
    model = check_model(model, values=True)
    inputs = as_inputs(example_inputs, model)
    network = for_inference(model, _written(model, inputs))
    inputs = _drawn(network, inputs, seed)
    try:
        with torch.no_grad():
            network(*inputs.args, **inputs.kwargs)
    except Exception as error:
        said = f"the forward raised {type(error).__name__} with {inputs.describe()}: {text_of(error):.300}"
        raise TraceError(said) from error
    return network, inputs


def _written(model: nn.Module, inputs: Inputs) -> Collection[str]:
    """Names of what a forward may write into; all, where that cannot be told."""
    try:
        return trace_forward(model, inputs).written()
    except TraceError:
        return tensor_names(model).keys()


def _drawn(network: nn.Module, inputs: Inputs, seed: int) -> Inputs:
    floating = [tensor for tensor in tensor_names(network).values() if tensor.is_floating_point()]
    dtype = floating[0].dtype if floating else torch.float32
    return inputs.noise(seed, _place(network), dtype)


def _place(network: nn.Module) -> torch.device:
    return next((tensor.device for tensor in tensor_names(network).values()), torch.device("cpu"))


def _device(network: nn.Module) -> str:
    """Such as "cpu (AVX512)" or "cuda (NVIDIA H100)"."""
    place = _place(network)
    if place.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(place)})"
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if place.type == "cpu" else str(place)

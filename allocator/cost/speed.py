"""Latency as a function of the kept neurons, from times of the model's modules at several widths."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from allocator.cost.latency import runnable
from allocator.cost.metric import Metric
from allocator.cost.terms import Term, elements
from allocator.flow.flow import Flow
from allocator.modules import modules_of

FORWARDS = 7


@dataclass(frozen=True)
class Speed:
    """How long a forward takes where it was measured.

    Attributes:
        costs: by module, nanoseconds whatever its width, per FLOP, and per number that is read or written.
    """

    costs: Mapping[str, tuple[float, float, float]]


class LatencyMetric(Metric):
    """Predicted nanoseconds of a forward."""

    def show(self, value: float) -> str:
        """A time in milliseconds."""
        return f"{value / 1e6:,.0f} ms" if value >= 999.5e6 else f"{value / 1e6:#.3g} ms"


def speed_terms(flow: Flow, flops: Iterable[Term], speed: Speed) -> list[Term]:
    """Nanoseconds of a forward: of every module a constant, and shares of its FLOPs and of what it reads and writes."""
    terms = [Term(sum(fixed for fixed, _, _ in speed.costs.values()), ())]
    for term, module in _work(flow, flops):
        _, per_flop, per_number = speed.costs.get(module, (0.0, 0.0, 0.0))
        rate = per_number if term.op < 0 else per_flop
        if rate > 0:
            terms.append(Term(rate * term.factor / (1 + term.printed), term.axes, module))
    return terms


def _work(flow: Flow, flops: Iterable[Term]) -> list[tuple[Term, str]]:
    """What modules do: FLOPs, whose terms name their call, and numbers that are read and written, whose terms don't."""
    work = [(term, term.module) for term in flops]
    for op in flow.trace.ops:
        for value in {*op.reads, *op.outputs}:
            if flow.trace.values[value].name is None:
                work.append((Term.of(elements(flow, value), op.module), op.module))
    return work


def module_seconds(model: nn.Module, example_inputs: Any) -> dict[str, float]:
    """Seconds in the forward of every module, without those within it: the median of several forwards in eval mode.

    Args:
        model: not changed.
        example_inputs: as for `allocate`; their floating-point values are drawn anew.
    """
    network, inputs = runnable(model, example_inputs)
    watch = _Watch(network)
    rounds = []
    with torch.no_grad():
        for _ in range(FORWARDS):
            watch.spent = defaultdict(float)
            network(*inputs.args, **inputs.kwargs)
            rounds.append(watch.spent)
    return {path: median(spent[path] for spent in rounds) for path in rounds[0]}


@dataclass
class _Watch:
    """Times of modules while a forward runs; what a module within takes is not its container's."""

    network: nn.Module
    spent: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._running: list[str] = []
        self._since = 0.0
        for path, module in modules_of(self.network).items():
            module.register_forward_pre_hook(lambda *_, path=path: self._enter(path), prepend=True)
            module.register_forward_hook(lambda *_: self._leave())

    def _enter(self, path: str) -> None:
        self._note()
        self._running.append(path)

    def _leave(self) -> None:
        self._note()
        self._running.pop()

    def _note(self) -> None:
        """What has passed since the last change belongs to the module that was running."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if self._running:
            self.spent[self._running[-1]] += now - self._since
        self._since = time.perf_counter()


@dataclass(frozen=True)
class Sample:
    """A network of some widths that was timed.

    Attributes:
        work: by module its FLOPs, and the numbers that it reads and writes.
        seconds: by module, from `module_seconds`.
    """

    work: Mapping[str, tuple[float, float]]
    seconds: Mapping[str, float]


def module_work(
    flow: Flow, flops: Iterable[Term], unit_of_slot: np.ndarray, kept: np.ndarray
) -> dict[str, tuple[float, float]]:
    """By module its FLOPs, and the numbers that it reads and writes, when the neurons with `kept` true are kept."""
    work = _work(flow, flops)
    amounts = Metric("work", "", [term for term, _ in work], unit_of_slot, len(kept)).per_term(kept)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (term, module), amount in zip(work, amounts.tolist(), strict=True):
        sums[module][term.op < 0] += amount
    return {module: (flops, numbers) for module, (flops, numbers) in sums.items()}


def fit_speed(samples: Sequence[Sample], whole: float) -> Speed:
    """Costs of modules that explain their times.

    Args:
        samples: networks of several widths, the original first.
        whole: seconds of the original's forward, to which the sum of its modules' is brought.
    """
    costs, predicted = {}, 0.0
    for module in {module for sample in samples for module in sample.seconds}:
        features = np.array([(1.0, *sample.work.get(module, (0.0, 0.0))) for sample in samples])
        seconds = np.array([sample.seconds.get(module, 0.0) for sample in samples])
        costs[module] = _least_squares(features, 1e9 * seconds)
        predicted += float(features[0] @ costs[module])
    factor = 1e9 * whole / max(predicted, 1.0)
    return Speed({module: (a * factor, b * factor, c * factor) for module, (a, b, c) in costs.items()})


def _least_squares(features: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Costs that are not negative, so that no neuron makes a forward faster."""
    scale = np.where(features.max(axis=0) > 0, features.max(axis=0), 1.0)
    found, _ = nnls(features / scale, values)
    fixed, per_flop, per_number = (found / scale).tolist()
    return fixed, per_flop, per_number

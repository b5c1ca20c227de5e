"""Requests that pair every value of every option with every value of every other, and what each has to keep to.

fvcore counts FLOPs and activations, torch parameters and what is alive at once; nothing here asks the cost model.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alive import alive_at_once
from allpairspy import AllPairs
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from random_checks import Snapshot, check_tensors, is_mixed, require_equal
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import allocator
from allocator.rewriting.kept import kept_by

# What is combined ------------------------------------------------------------------------------------


def _array(model: nn.Module, traced: Callable[[], allocator.ChannelGraph]) -> Any:
    return np.random.default_rng(1).lognormal(size=traced().size)


def _by_parameter(model: nn.Module, traced: Callable[[], allocator.ChannelGraph]) -> Any:
    return {name: p.detach().abs().double() for name, p in model.named_parameters() if p.is_floating_point()}


def _of_torch_pruning(model: nn.Module, traced: Callable[[], allocator.ChannelGraph]) -> Any:
    import torch_pruning

    return torch_pruning.importance.GroupMagnitudeImportance()


def _function(graph: allocator.ChannelGraph, weights: Callable[[str], Tensor]) -> np.ndarray:
    return np.random.default_rng(2).random(graph.size)


OWN: dict[str, Callable[..., Any]] = {
    "an array": _array,
    "a function": lambda *_: _function,
    "by parameter": _by_parameter,
    "of Torch-Pruning": _of_torch_pruning,
    "fisher and group_norm": lambda *_: ["fisher", "group_norm"],
}
WITH_DATA = ("fisher", "taylor", "activation", "reconstruction", "surgeon", "fisher and group_norm")
FACTORS: dict[str, tuple[Any, ...]] = {
    "criterion": ("group_norm", "magnitude", "bn_scale", "fpgm", "random", *WITH_DATA[:-1], *OWN),
    "budgets": (
        ("flops",),
        ("params",),
        ("activations",),
        ("peak_activations",),
        ("flops", "params"),
        ("params", "peak_activations"),
        ("flops", "params", "activations", "peak_activations"),
    ),
    "policy": ("auto", "per_block", "global", "uniform", "isomorphic", "priced"),
    "scope": ("auto", "branches", "inner", "all", "narrowest"),
    "share": (85, 60, 40),
    "multiple": (1, 2, 4, 8),
    "at_least": (None, 3, "25%"),
    "groups": ("auto", "whole", "width"),
    "norms": ("exact", "loose"),
    "fill": (True, False),
}


@dataclass(frozen=True)
class Request:
    """One value of every option.

    Attributes:
        criterion: a registered name, or a key of `OWN`.
        budgets: the metrics that are limited.
        share: percent of the network's own that each of them allows.
        policy, scope, multiple, at_least, groups, norms, fill: as for `allocator.allocate`.
    """

    criterion: str
    budgets: tuple[str, ...]
    policy: str
    scope: Any
    share: int
    multiple: int
    at_least: Any
    groups: Any
    norms: Any
    fill: bool

    def allocate(self, model: nn.Module, x: Tensor, limits: Mapping[str, Any], certify: bool = True) -> Any:
        """The request, at these budgets."""

        def traced() -> allocator.ChannelGraph:
            return allocator.trace(model, x, groups=self.groups, norms=self.norms)

        criterion = OWN[self.criterion](model, traced) if self.criterion in OWN else self.criterion
        data = (images(x), _loss) if self.criterion in WITH_DATA else (None, None)
        chosen = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("criterion", "budgets", "share")
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", allocator.AllocatorWarning)
            return allocator.allocate(
                model,
                **limits,
                criterion=criterion,
                data=data[0],
                loss=data[1],
                example_inputs=x,
                certify=certify,
                **chosen,
            )

    def __str__(self) -> str:
        return " ".join("+".join(each) if isinstance(each, tuple) else f"{each}" for each in asdict(self).values())


def covering() -> list[Request]:
    """Requests that hold every pair of values of any two options; the same ones every time."""
    return [Request(**dict(zip(FACTORS, row, strict=True))) for row in AllPairs(list(FACTORS.values()))]


def images(x: Tensor) -> Tensor:
    """Twelve random inputs, two gradients' worth."""
    return torch.randn(12, *x.shape[1:], generator=torch.Generator().manual_seed(3))


def _loss(output: Any, target: Any) -> Tensor:
    return torch.stack([t.float().square().mean() for t in tree_leaves(output) if t.is_floating_point()]).sum()


# What must hold --------------------------------------------------------------------------------------


def counts(model: nn.Module, x: Tensor) -> dict[str, int]:
    """What a network costs, as fvcore and torch count it in an eval-mode forward."""
    small = copy.deepcopy(model).eval()
    return {
        "flops": _analysed(FlopCountAnalysis, small, x),
        "params": sum(parameter.numel() for parameter in small.parameters()),
        "activations": _analysed(ActivationCountAnalysis, small, x),
        "peak_activations": alive_at_once(small, x.clone()),
    }


def _analysed(kind: Any, model: nn.Module, x: Tensor) -> int:
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    analysis = kind(model, (x.clone(),))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return int(analysis.total())


def check(model: nn.Module, x: Tensor, request: Request) -> str:
    """Hold every promise against one request; returns "result", "unseen", "budget" or "nothing" for what it came to."""
    before, fresh, own = Snapshot(model), copy.deepcopy(model), counts(model, x)
    limits = {name: own[name] * request.share / 100 for name in request.budgets}
    outcome = "result"
    try:
        result = request.allocate(model, x, limits)
    except allocator.NothingToAllocateError as error:
        check_reasons(error.reasons)
        outcome = "nothing"
    except allocator.CriterionError as error:
        if not cannot_rank(str(error)):
            raise
        outcome = "nothing"
    except allocator.BudgetError as error:
        check_unmet(model, x, request, limits, own, error)
        outcome = "budget"
    except allocator.CertificateError as error:
        if "was not shown" not in str(error):  # no output depends on what was dropped
            raise
        check_result(model, fresh, x, request, request.allocate(model, x, limits, certify=False), limits, own)
        outcome = "unseen"
    else:
        check_result(model, fresh, x, request, result, limits, own)
        check_certificate(model, x, result)
    before.require_same()
    return outcome


def check_result(
    model: nn.Module,
    fresh: nn.Module,
    x: Tensor,
    request: Request,
    result: allocator.Result,
    limits: dict[str, float],
    own: dict[str, int],
) -> None:
    """Everything but the values: budgets, indices, widths, weights, the same again, and through a file."""
    check_costs(result, x, limits, own)
    check_kept(model, result)
    check_widths(model, result, request)
    check_optimality(result)
    check_tensors(model, result.model, result.allocation)
    again = request.allocate(fresh, x, limits, certify=False)
    assert again.allocation == result.allocation, "the same request on a copy gives another allocation"
    check_round_trip(fresh, result, x)


def check_reasons(reasons: list[str]) -> None:
    """It is said why nothing can go."""
    assert reasons
    assert all(reasons)


def cannot_rank(said: str) -> bool:
    """Whether a criterion is right to refuse."""
    if "could not be taken" in said:  # the network writes over what its own gradient needs
        return "inplace operation" in said
    return "no batch norm with a scale" in said


def check_unmet(
    model: nn.Module, x: Tensor, request: Request, limits: dict[str, float], own: dict[str, int], error: Any
) -> None:
    """What is named as reachable lies above what was asked, and one budget of that much can be met."""
    assert error.asked in limits.values()
    assert error.reachable is not None
    assert error.asked < error.reachable
    if len(limits) == 1:
        (name,) = limits
        if own[name] >= error.reachable:
            result = request.allocate(model, x, {name: error.reachable}, certify=False)
            check_costs(result, x, {name: error.reachable}, own)
            check_widths(model, result, request)


def check_costs(result: allocator.Result, x: Tensor, limits: dict[str, float], own: dict[str, int]) -> None:
    """fvcore and torch count what the allocation says, within every budget."""
    found = counts(result.model, x)
    for name, limit in limits.items():
        said = result.allocation.costs[name]
        if name == "peak_activations":  # variables may hold tensors for longer than the trace sees
            assert said["before"] <= own[name]
            assert said["after"] <= min(found[name], limit)
            continue
        assert (said["before"], said["after"]) == (own[name], found[name]), name
        assert found[name] <= limit, f"{name}: {found[name]} where {limit} is allowed"
    assert result.flops_after == found["flops"]


def check_kept(model: nn.Module, result: allocator.Result) -> None:
    """Indices are there, in order, and each once."""
    shapes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, dims in result.allocation.kept.items():
        assert len(dims) == len(shapes[name])
        for indices, size in zip(dims, shapes[name], strict=True):
            rows = indices if indices and isinstance(indices[0], list) else [indices or []]
            for row in rows:
                assert row == sorted(set(row)), f"{name}: {row}"
                assert not row or (row[0] >= 0 and row[-1] < size), f"{name}: {row}"


def check_widths(model: nn.Module, result: allocator.Result, request: Request) -> None:
    """Layers that write neurons have a multiple, or what they had, and no fewer channels than asked for.

    A layer whose places go with those of another, wider or narrower one follows that one's width.
    """
    graph, layers = result.graph, dict(result.model.named_modules())
    for path, layer in model.named_modules():
        if not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)) or path in graph.optional:
            continue
        after, before = (_width(each) for each in (layers[path], layer))
        if after == before or f"{path}.weight" not in result.allocation.kept:
            continue
        least = {None: 1, 3: 3, "25%": -(-before // 4)}[request.at_least]
        assert after >= min(least, before), f"{path} keeps {after} of {before}"
        if _own_width(graph, f"{path}.weight", before):
            assert after % request.multiple == 0, f"{path} keeps {after} of {before}"


def _own_width(graph: allocator.ChannelGraph, name: str, width: int) -> bool:
    units = graph.units(graph.slots.labels(name)[0])
    writers = {int(branch) for branch in graph.branch_of[units]}
    return len(writers) == 1 and len(graph.facts.written[writers.pop()].label) == width


def _width(layer: Any) -> int:
    return int(layer.out_channels if isinstance(layer, nn.modules.conv._ConvNd) else layer.out_features)


def check_optimality(result: allocator.Result) -> None:
    """No plan keeps more than the bound."""
    found = result.optimality
    if found is not None and found.bound is not None:
        assert found.importance <= found.bound + 1e-9
        assert found.gap is not None
        assert 0 <= found.gap <= 1


def check_round_trip(fresh: nn.Module, result: allocator.Result, x: Tensor) -> None:
    """Saved, read and applied to a copy, an allocation gives the same network."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "alloc.json"
        result.allocation.save(path)
        assert allocator.Allocation.load(path) == result.allocation
        require_equal(allocator.apply(fresh, path), result.model, x)


def check_certificate(model: nn.Module, x: Tensor, result: allocator.Result) -> None:
    """In float64 outputs are the original's, but under a norm over channels that may go; anybody can see it again."""
    error = result.certificate.relative_error
    assert result.certificate.ok
    assert error is not None
    assert error <= 1e-9 or is_mixed(model, result.allocation)
    assert allocator.verify(model, result.model, result.allocation, example_inputs=x).ok
    kept = kept_by(result.graph, result.allocation)
    assert kept is not None
    assert np.array_equal(kept, result.plan.kept)

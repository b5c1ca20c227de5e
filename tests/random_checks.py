"""What must hold for any network and any request; shares no code with what it checks.

Models are compared with a reference of our own: the original in float64, in which every convolution and
linear layer reads zero wherever the allocation says that its input was dropped.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from random_layers import NonLocal, Project, Reorder, Standardised
from random_networks import Spec, build, convert
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import allocator
from allocator.rewriting.kept import kept_by
from allocator.rewriting.lineage import LINEAGE_ATTRIBUTE
from allocator.settings import Groups, Norms, Scope

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Case:
    """A network and a request.

    Attributes:
        spec: the network.
        share: the budget over the network's own FLOPs.
        policy, scope, groups, norms, criterion, fill, exclude: as for `allocator.allocate`.
        again: the budget of a second allocation over the FLOPs of the first one's result.
    """

    spec: Spec
    share: float
    policy: str = "per_block"
    scope: Scope = "auto"
    groups: Groups = "whole"
    norms: Norms = "exact"
    criterion: str = "bn_scale"
    fill: bool = True
    exclude: tuple[str | type, ...] = ()
    again: float = 0.8

    def allocate(self, model: nn.Module, x: Tensor, flops: float, *, certify: bool = True) -> allocator.Result:
        """The request, at a budget in FLOPs."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", allocator.AllocatorWarning)
            return allocator.allocate(
                model, flops, example_inputs=x, policy=self.policy, scope=self.scope, groups=self.groups,
                norms=self.norms, criterion=self.criterion, fill=self.fill, exclude=self.exclude, certify=certify,
            )  # fmt: skip


def check(case: Case, *, by_turns: bool = False) -> str:
    """Hold every promise against one case; returns "result", "budget", "nothing" or "unseen".

    Args:
        case: the network and the request.
        by_turns: of the four costly checks only one, chosen by what the case is, so that each has a quarter of them:
            the certificate made anew with the report, that made of a wrong index, the request repeated with its file
            read and applied, and a second allocation composed with the first.
    """
    x = convert(example(case.spec.shape), case.spec.numbers)
    turn = zlib.crc32(repr(case).encode()) if by_turns else None
    return check_model(build(case.spec), build(case.spec), x, case, turn)


def example(shape: tuple[int, ...], batch: int = 1) -> Tensor:
    """A fixed standard normal input."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(11))


def check_model(model: nn.Module, fresh: nn.Module, x: Tensor, case: Case, turn: int | None = None) -> str:
    """`check` for a model at hand.

    Args:
        model: the network.
        fresh: the same model built a second time.
        x: its input.
        case: the request.
        turn: which of the costly checks is made; all where there is none.
    """
    before, given = Snapshot(model), x.clone()
    own = count(model, x)
    budget = case.share * own
    outcome = "result"
    try:
        result = allocate(case, model, x, budget)
    except allocator.NothingToAllocateError as error:
        before.require_same()
        _require(bool(error.reasons), "no reasons are given")
        check_nothing(model, x, case, own)
        return "nothing"
    except allocator.BudgetError as error:
        before.require_same()
        _require(error.asked == budget, "the error names another budget")
        _require(error.reachable is not None and budget < error.reachable <= own, f"reachable: {error.reachable}")
        budget, outcome = float(error.reachable or 0), "budget"
        result = allocate(case, model, x, budget)
        check_reachable(result, budget)
    before.require_same()
    assert torch.equal(x, given), "the example input was changed"
    assert result.flops_before == own
    check_budget(result, x, budget, case.fill)
    check_result(model, result, x)
    check_excluded(model, result, case.exclude)
    if not result.certificate.compared:
        before.require_same()
        return "unseen"
    costly = (
        lambda: check_again(model, result, x),
        lambda: check_tampering(model, result.model, result.allocation, x),
        lambda: check_repeated(fresh, result, x, case, budget),
        lambda: check_composed(model, fresh, result, x, case),
    )
    for each in costly if turn is None else (costly[turn % len(costly)],):
        each()
    before.require_same()
    return outcome


def allocate(case: Case, model: nn.Module, x: Tensor, budget: float) -> allocator.Result:
    """The request; without the numeric check where that is refused since no output depends on what is dropped."""
    try:
        return case.allocate(model, x, budget)
    except allocator.CertificateError as error:
        if "NOT SHOWN" not in str(error):
            raise
    result = case.allocate(model, x, budget, certify=False)
    check_no_effect(model, result.allocation, x)
    return result


def check_reachable(result: allocator.Result, figure: float) -> None:
    """A run at the smallest figure lands on it; where neurons turned out to be needed, at most 1 % below."""
    repaired = any(" stay: " in note for note in result.notes)
    least = figure - repaired * result.flops_before / 100
    assert least <= result.flops_after <= figure, "a run at the reachable figure lands elsewhere"


def check_no_effect(model: nn.Module, allocation: allocator.Allocation, x: Tensor) -> None:
    """The original gives the same without what is dropped, as where it subtracts a map from itself."""
    uncut, cut = copy.deepcopy(model).double().eval(), reference(model, allocation).eval()
    with torch.no_grad():
        pairs = zip(tree_leaves(uncut(x.double())), tree_leaves(cut(x.double())), strict=True)
        assert all(torch.allclose(a, b, TOLERANCE, TOLERANCE) for a, b in pairs), "refused, and there is an effect"


def check_nothing(model: nn.Module, x: Tensor, case: Case, own: int) -> None:
    """Where no neuron can be removed at one budget, none can at the widest."""
    try:
        allocate(case, model, x, own - 1)
    except allocator.NothingToAllocateError:
        return
    raise AssertionError("nothing can be allocated, yet it can at a wider budget")


def _require(truth: bool, what: str) -> None:
    assert truth, what


class Snapshot:
    """Everything a caller could see of a model, to be held against it later."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen = self._look()
        self.values = {name: value.clone() for name, value in _tensors(model).items()}

    def _look(self) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in _tensors(self.model).items():
            facts = (id(value), value.data_ptr(), value._version, value.requires_grad, value.grad is None)
            seen[name] = facts
        for path, module in self.model.named_modules():
            seen[f"{path}()"] = id(module), type(module), copy.deepcopy(_plain(module))
        return seen

    def require_same(self) -> None:
        """Fail unless the model is bit for bit as it was."""
        now = self._look()
        assert now.keys() == self.seen.keys()
        for key, value in self.seen.items():
            assert now[key] == value, f"{key} was changed"
        for name, value in _tensors(self.model).items():
            assert torch.equal(value, self.values[name]), f"{name} was changed"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that are plain values, and how many hooks there are."""
    kinds = (bool, int, float, str, tuple, list, type(None))
    own = {key: value for key, value in vars(module).items() if key != LINEAGE_ATTRIBUTE}
    plain = {key: value for key, value in own.items() if isinstance(value, kinds)}
    return plain | {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}


def count(model: nn.Module, x: Tensor) -> int:
    """fvcore's own count of an eval-mode forward, on a copy."""
    analysis = FlopCountAnalysis(copy.deepcopy(model).eval(), (x.clone(),))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return int(analysis.total())


def check_budget(result: allocator.Result, x: Tensor, budget: float, fill: bool) -> None:
    """fvcore's count is what the result says, under the budget, with no room for one more neuron."""
    counted = count(result.model, x)
    assert counted == result.flops_after == result.allocation.flops_after
    assert counted <= budget
    graph = result.graph
    kept = kept_by(graph, result.allocation)
    assert kept is not None
    costs = []
    for unit in (~kept).nonzero()[0]:
        more = kept.copy()
        more[unit] = True
        costs.append(graph.metric("flops").value(more) - counted)
    assert result.next_cost == min(costs, default=None)
    if fill and costs:
        assert counted + min(costs) > budget, "a further neuron fits into the budget"


def check_result(model: nn.Module, result: allocator.Result, x: Tensor) -> None:
    """The result is the original minus what its allocation drops, and a model like any other."""
    small, allocation = result.model, result.allocation
    error = result.certificate.relative_error
    assert result.certificate.ok
    assert error is not None or not result.certificate.compared
    assert error is None or error <= TOLERANCE or is_mixed(model, allocation)
    assert type(small) is type(model)
    assert small.training == model.training
    check_tensors(model, small, allocation)
    check_attributes(model, small)
    if not is_mixed(model, allocation):
        check_outputs(model, small, allocation, x)
    check_training(model, small, x)


def check_again(model: nn.Module, result: allocator.Result, x: Tensor) -> None:
    """The certificate of the result can be made anew, and there is a report."""
    assert allocator.verify(model, result.model, result.allocation, example_inputs=x).ok
    assert result.report().to_dict()


def is_mixed(model: nn.Module, allocation: allocator.Allocation) -> bool:
    """Whether channels may be gone from under a norm that takes them all together, which changes outputs."""
    joint = [m for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm, Standardised)) or _normalises(m)]
    return allocation.norms == "loose" and bool(joint)


def _normalises(module: nn.Module) -> bool:
    return isinstance(module, Reorder) and module.how == "normalise"


def check_excluded(model: nn.Module, result: allocator.Result, exclude: tuple[str | type, ...]) -> None:
    """What was excluded is as it was."""
    for path, module in model.named_modules():
        if any(isinstance(module, e) if isinstance(e, type) else f"{path}.".startswith(f"{e}.") for e in exclude):
            own = {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
            assert own.isdisjoint(result.allocation.kept), f"{path} was excluded"


def check_tensors(model: nn.Module, small: nn.Module, allocation: allocator.Allocation) -> None:
    """Every tensor of the result is the part of the original's that the allocation names, in a memory of its own."""
    gone = tuple(f"{path}." for path in allocation.absent)
    old, new = _tensors(model), _tensors(small)
    old = {name: tensor for name, tensor in old.items() if not name.startswith(gone)}
    assert old.keys() == new.keys()
    assert [name for name in model.state_dict() if not name.startswith(gone)] == list(small.state_dict())
    first = {id(tensor): name for name, tensor in reversed(old.items())}
    for name, tensor in old.items():
        expected = tensor.detach()
        for dim, indices in enumerate(allocation.kept.get(first[id(tensor)], [])):
            if indices is None:
                continue
            if indices and isinstance(indices[0], list):
                expected = torch.stack([row[torch.tensor(ids)] for row, ids in zip(expected, indices)])
            else:
                expected = expected.index_select(dim, torch.tensor(indices, dtype=torch.long))
        if name in allocation.renumbered:
            left_out = set(tensor.tolist()) - set(expected.tolist())
            expected = expected.new_tensor([n - sum(each < n for each in left_out) for n in expected.tolist()])
        assert torch.equal(new[name], expected), f"{name} is not the part that was kept"
        assert not tensor.numel() or new[name].data_ptr() != tensor.data_ptr(), f"{name} is shared"
        assert new[name].requires_grad == tensor.requires_grad
    for name, tensor in old.items():
        assert (new[name] is new[first[id(tensor)]]) == (tensor is old[first[id(tensor)]]), f"{name}: a tie is gone"


# Attributes that stand for a number of channels, by class and those made from it; no other may change.
_SIZES = {
    "Shuffle": {"width"}, "Split": {"width", "sizes", "literal", "left", "right"}, "Hierarchy": {"width"},
    "Slice": {"count", "rest"}, "Selective": {"out"}, "Unflatten": {"unflattened_size"},
}  # fmt: skip
_SIZES |= {"MultiheadAttention": {"embed_dim", "kdim", "vdim", "head_dim", "num_heads", "_qkv_same_embed_dim"}}
_STANDARD = {"in_channels", "out_channels", "groups", "in_features", "out_features", "num_features"}
_STANDARD |= {"num_parameters", "num_channels", "num_groups", "normalized_shape"}


def check_attributes(model: nn.Module, small: nn.Module) -> None:
    """What layers say of themselves is what their tensors are, and nothing else changed."""
    for (path, old), module in zip(model.named_modules(), small.modules(), strict=True):
        before, after = _plain(old), _plain(module)
        assert before.keys() == after.keys()
        changed = {key for key in before if before[key] != after[key]}
        kinds = type(old).__mro__
        allowed = set().union(*(_SIZES.get(kind.__name__, set()) for kind in kinds))
        allowed |= _STANDARD if kinds[0].__module__.startswith("torch") else set()
        assert changed <= allowed, f"{path}: {changed} changed"
        if isinstance(module, nn.modules.conv._ConvNd):
            shape = module.weight.shape
            a, b = shape[0], shape[1] * module.groups
            said = (module.in_channels, module.out_channels)
            assert said == ((a, b) if module.transposed else (b, a)), f"{path}: {module} with a weight of {shape}"
        elif isinstance(module, nn.GroupNorm) and isinstance(old, nn.GroupNorm):
            wide, kept = old.num_channels // old.num_groups, module.num_channels // module.num_groups
            assert kept == wide or module.num_groups == old.num_groups, f"{path}: groups were lost, and made narrower"
            assert module.weight is None or len(module.weight) == module.num_channels, path
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape), path
        elif isinstance(module, nn.modules.batchnorm._NormBase) and module.weight is not None:
            assert module.num_features == len(module.weight), path
        elif isinstance(module, nn.PReLU):
            assert module.num_parameters == len(module.weight), path


def reference(model: nn.Module, allocation: allocator.Allocation) -> nn.Module:
    """The original in float64, reading zero wherever its input was dropped."""
    ref = copy.deepcopy(model).double()
    names = {id(parameter): name for name, parameter in ref.named_parameters()}

    def dims(tensor: Tensor) -> list[Any]:
        return allocation.kept.get(names[id(tensor)], [None] * tensor.dim())

    for module in ref.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            kept = dims(module.weight)
            _zero_columns(module.weight.data, kept, 0 if getattr(module, "transposed", False) else 1)
        elif isinstance(module, NonLocal):  # no weight reads queries and keys
            for layer in (module.query, module.key):
                for tensor in (layer.weight, layer.bias):
                    _zero_columns(tensor.data, [dims(tensor)[0], *[None] * (tensor.dim() - 1)], 0)
        elif isinstance(module, Project):
            _zero_columns(module.weight.data, dims(module.weight), 0)
        elif isinstance(module, nn.MultiheadAttention):
            _zero_columns(module.in_proj_weight.data, dims(module.in_proj_weight), 1)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    return ref


def _zero_columns(weight: Tensor, kept: list[Any], dim: int) -> None:
    indices = kept[dim]
    if indices is None:
        return
    mask = torch.zeros_like(weight)
    if indices and isinstance(indices[0], list):
        rows = range(len(weight)) if kept[0] is None else kept[0]
        for row, columns in zip(rows, indices, strict=True):
            mask[row, columns] = 1
    else:
        mask.index_fill_(dim, torch.tensor(indices, dtype=torch.long), 1)
    weight.mul_(mask)


def check_outputs(model: nn.Module, small: nn.Module, allocation: allocator.Allocation, x: Tensor) -> None:
    """Reference and result agree in eval and in train mode (auxiliary heads included), in several batches and sizes.

    In another size only where the original takes it: a head that flattens its map does not.
    """
    ref, own = reference(model, allocation), copy.deepcopy(small).double()
    for module in own.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    channels, *sides = x.shape[1:]
    for training, batch, longer in ((False, 1, 0), (True, 2, 0), (False, 3, 4), (True, 3, -2)):
        drawn = example((channels, *(side + longer for side in sides)), batch).double()
        with torch.no_grad():
            try:
                expected = tree_leaves(ref.train(training)(drawn.clone()))
            except (RuntimeError, ValueError, AssertionError):  # attention asserts its width
                assert longer, "the original runs with what it was made for"
                continue
            found = tree_leaves(own.train(training)(drawn.clone()))
        assert [t.shape for t in found] == [t.shape for t in expected]
        for a, b in zip(found, expected, strict=True):
            error = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-300)
            assert error <= TOLERANCE, f"outputs differ by {error:.1e} for {tuple(drawn.shape)}, training={training}"


def check_tampering(model: nn.Module, small: nn.Module, allocation: allocator.Allocation, x: Tensor) -> None:
    """One wrong index in one tensor, and the certificate fails."""
    rows = [(name, d) for name, dims in allocation.kept.items() for d, kept in enumerate(dims) if kept]
    tensors = {name: value for name, value in _tensors(small).items() if value.numel()}
    rows = [(name, d) for name, d in rows if name in tensors]
    if not rows:
        return
    name, dim = rows[len(rows) // 2]
    wrong = copy.deepcopy(small)
    with torch.no_grad():
        _tensors(wrong)[name].copy_(_with_wrong_index(_tensors(model)[name], allocation.kept[name], dim))
    if torch.equal(_tensors(wrong)[name], tensors[name]):
        return
    assert not allocator.verify(model, wrong, allocation, example_inputs=x).ok, f"{name} holds a wrong index"


def _with_wrong_index(tensor: Tensor, kept: list[Any], dim: int) -> Tensor:
    """The part of a tensor that is kept, but for the first index of `dim`, which is one that is dropped."""
    result = tensor.detach()
    for d, indices in enumerate(kept):
        if indices is not None:
            own = list(indices[0] if isinstance(indices[0], list) else indices) if indices else []
            if d == dim:
                own[0] = min(set(range(tensor.shape[d])) - set(own))
            result = result.index_select(d, torch.tensor(own, dtype=torch.long))
    return result


def check_training(model: nn.Module, small: nn.Module, x: Tensor) -> None:
    """Where the original trains a step, so does the result.

    What autograd saves, and so what may be written over, depends on how tensors lie in memory; such errors are
    the network's own.
    """
    if _train_step(copy.deepcopy(model), x) is not None:
        return
    error = _train_step(copy.deepcopy(small), x)
    assert error is None or "inplace operation" in str(error), f"the result does not train: {error}"


def _train_step(model: nn.Module, x: Tensor) -> Exception | None:
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    try:
        outputs = tree_leaves(model(torch.cat([x, x + 1])))
        torch.stack([t.square().mean() for t in outputs]).sum().backward()
    except (RuntimeError, ValueError) as error:
        return error
    optimiser.step()
    return None


def check_repeated(fresh: nn.Module, result: allocator.Result, x: Tensor, case: Case, budget: float) -> None:
    """The same request on a fresh build gives the same allocation, which can be saved, read and applied."""
    again = case.allocate(fresh, x, budget)
    assert again.allocation == result.allocation
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "alloc.json"
        result.allocation.save(path)
        assert allocator.Allocation.load(path) == result.allocation
        applied = allocator.apply(fresh, path)
    require_equal(applied, result.model, x)


def require_equal(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    """Fail unless two models have the same tensors, attributes and outputs."""
    left, right = _tensors(a), _tensors(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    for (path, one), (_, other) in zip(a.named_modules(), b.named_modules(), strict=True):
        assert _plain(one) == _plain(other), path
    with torch.no_grad():
        outputs = [tree_leaves(copy.deepcopy(m).eval()(x.clone())) for m in (a, b)]
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


def check_composed(model: nn.Module, fresh: nn.Module, result: allocator.Result, x: Tensor, case: Case) -> None:
    """Allocating the result again works, and both allocations in one give the same network."""
    first = Snapshot(result.model)
    request = replace(case, share=case.again)
    try:
        second = allocate(request, result.model, x, case.again * result.flops_after)
    except (allocator.BudgetError, allocator.NothingToAllocateError):
        first.require_same()
        return
    first.require_same()
    check_result(result.model, second, x)
    if not second.certificate.compared:
        return
    check_again(result.model, second, x)
    check_tampering(result.model, second.model, second.allocation, x)
    both = result.allocation.compose(second.allocation)
    require_equal(allocator.apply(fresh, both), second.model, x)
    assert both.flops_before == result.flops_before
    assert both.flops_after == second.flops_after
    check_tensors(model, second.model, both)
    assert allocator.verify(model, second.model, both, example_inputs=x).ok

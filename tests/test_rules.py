"""Every operator rule against the oracle, and the oracle against wrong rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import rule_cases as compute
import rule_cases_draws as draws
import rule_cases_moves as moves
import rule_cases_recurrent as recurrent
import torch
import torch.nn.functional as F
from declarations import scratch, with_rule
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, Claim, Data, below, claim, is_part, positive, truth, violations
from rule_rows import FEATURES, IMAGE, SIGNAL, aten, case, each, image
from torch import nn

import allocator
from allocator.flow.flow import Flow
from allocator.tracing.calls import Op
from allocator.tracing.operators import DECLARATIONS, operator, operator_of

_ROWS: dict[str, list[Case]] = {
    **compute.CONTRACTION,
    **compute.NORMS,
    **compute.REDUCTIONS,
    **compute.MIXING,
    **compute.POINTWISE,
    **draws.FREQUENCIES,
    **draws.DRAWS,
    **compute.SPATIAL,
    **moves.VIEWS,
    **moves.CREATION,
    **moves.JOINS,
    **moves.PARTS,
    **recurrent.RECURRENT,
}
TABLE = {name: rows for name, rows in _ROWS.items() if "::" in name or hasattr(torch.ops.aten, name)}
"""Without operators that an older torch does not have."""
ROWS = [pytest.param(name, row, id=f"{name}-{i}") for name, rows in TABLE.items() for i, row in enumerate(rows)]


def reaching(operator: str, row: Case) -> Claim:
    """The claim for a case, traced so that it dispatches to the operator.

    Composite operators arrive as their parts, except where autograd is off altogether.
    """
    for inference in (False, True):
        claimed = claim(row, inference=inference)
        if not claimed.operators.isdisjoint({operator, f"{operator}_"}):
            return claimed
    raise AssertionError(f"the case calls {sorted(claimed.operators)}, not {operator}")


# ------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(("operator", "row"), ROWS)
def test_the_rule_agrees_with_the_operator(operator: str, row: Case) -> None:
    assert violations(row, reaching(operator, row)) == []


def test_every_rule_has_rows() -> None:
    assert set(TABLE) == {name for name, declared in DECLARATIONS.items() if declared.rule is not None}
    assert all(TABLE.values())


# ------------------------------------------------------------------- operators that torch calls pointwise

# Kinds of values to try, each with a number of that kind; operators that mix kinds are spelled out.
_KINDS: list[tuple[Any, Any]] = [((positive,) * 3, 0.5), ((below(4),) * 3, 1), ((truth,) * 3, True)]
_MIXED: dict[str, tuple[Any, ...]] = {
    "masked_fill": (positive, truth, positive),
    "native_dropout_backward": (positive, truth),
    "where": (truth, positive, positive),
}


def _tagged() -> Iterator[str]:
    for name in dir(aten):
        packet = getattr(aten, name)
        overloads = packet.overloads() if hasattr(packet, "overloads") else []
        if any(torch.Tag.pointwise in getattr(packet, o).tags for o in overloads):
            yield name


def _pointwise_cases(name: str) -> Iterator[Case]:
    """A case for every overload that takes tensors."""
    packet = getattr(aten, name)
    for overload in (getattr(packet, o) for o in packet.overloads()):
        arguments = overload._schema.arguments
        takes_tensors = any("Tensor" in str(a.type) for a in arguments)
        gives_tensors = all("Tensor" in str(r.type) for r in overload._schema.returns)
        plain = takes_tensors and gives_tensors and not any(a.is_out for a in arguments)
        if torch.Tag.pointwise in overload.tags and plain:
            yield _pointwise_case(name, overload)


def _pointwise_case(name: str, overload: Any) -> Case:
    """A case whose kind of values is found by trying."""
    arguments = [a for a in overload._schema.arguments if _needed(a)]
    count = sum("Tensor" in str(a.type) for a in arguments)
    for kinds, number in [(_MIXED[name], 0.5)] if name in _MIXED else _KINDS:
        row = case(
            _call(overload, arguments, number),
            *(Data((2, 6, 3), (1,), kind) for kind in kinds[:count]),
        )
        try:
            row.run(None, *(d.make(d.shape) for d in row.data))
        except (RuntimeError, TypeError):
            continue
        return row
    raise AssertionError(f"no arguments were found for {overload}")


def _needed(argument: Any) -> bool:
    optional = str(argument.type) in ("Optional[Tensor]", "Optional[number]", "Optional[float]")
    return optional or not argument.has_default_value()


def _call(overload: Any, arguments: list[Any], number: Any) -> Callable[..., Any]:
    """The overload as a function of a module, which it ignores, and tensors."""
    plain = {"int": 1, "bool": False, "str": "none", "Optional[str]": "floor"}

    def run(m: Any, *tensors: torch.Tensor) -> Any:
        rest = iter(tensors)
        given = {a.name: next(rest) if "Tensor" in str(a.type) else plain.get(str(a.type), number) for a in arguments}
        named = {a.name: given.pop(a.name) for a in arguments if a.kwarg_only}
        return overload(*given.values(), **named)

    return run


@pytest.mark.parametrize("name", list(_tagged()))
def test_operators_that_torch_tags_pointwise(name: str) -> None:
    rows = list(_pointwise_cases(name))
    for row in rows:
        assert violations(row, claim(row)) == []


# ------------------------------------------------------------------------------- chains of rearrangements

Step = Callable[[torch.Tensor], torch.Tensor]


@st.composite
def _factors(draw: st.DrawFn, number: int) -> list[int]:
    """Sizes whose product is the number, some of them 1."""
    sizes = []
    while number > 1:
        size = draw(st.sampled_from([n for n in range(1, number + 1) if number % n == 0]))
        sizes.append(size)
        number //= size
        if size == 1 and sizes.count(1) > 2:
            return [*sizes, number]
    return sizes or [1]


@st.composite
def _chains(draw: st.DrawFn) -> tuple[Data, list[Step]]:
    """Sizes, a dim with channels, and a chain of operators that only move values."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3).filter(lambda n: max(n) > 1))
    data = Data(tuple(shape), (draw(st.sampled_from([d for d, n in enumerate(shape) if n > 1])),))
    x, steps = torch.zeros(shape), list[Step]()
    for _ in range(draw(st.integers(1, 5))):
        dim = draw(st.integers(-x.dim(), x.dim() - 1))
        moves: list[Step] = [
            functools.partial(torch.reshape, shape=draw(_factors(x.numel()))),
            functools.partial(torch.permute, dims=draw(st.permutations(range(x.dim())))),
            functools.partial(torch.unsqueeze, dim=dim),
            functools.partial(torch.flip, dims=[dim]),
        ]
        if x.numel() <= 100:
            moves.append(functools.partial(torch.repeat_interleave, repeats=2, dim=dim))
            moves.append(functools.partial(torch.tile, dims=(2, *[1] * (x.dim() - 1))))
        steps.append(draw(st.sampled_from(moves)))
        x = steps[-1](x)
    return data, steps


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_chains())
def test_every_value_moves_where_its_label_says(chain: tuple[Data, list[Step]]) -> None:
    data, steps = chain

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        return functools.reduce(lambda t, step: step(t), steps, x)

    claimed = claim(case(run, data))
    (dim,) = data.channels
    kind = np.zeros(claimed.total, dtype=np.int64)  # 0 where a slot must stay
    for number, part in enumerate(claimed.classes, 1):
        kind[part] = number
    own = claimed.tensors["x0"][dim]
    assert own is not None
    view = [-1 if d == dim else 1 for d in range(len(data.shape))]
    tags = run(None, torch.from_numpy(kind[own]).view(view).expand(data.shape))
    (labels,) = claimed.outputs
    reached = [kind[label] for label in labels if label is not None]
    places = [d for d, label in enumerate(labels) if label is not None]
    assert len(places) <= 1
    expected = torch.zeros_like(tags)
    for d, found in zip(places, reached, strict=True):
        expected += torch.from_numpy(found).view([-1 if k == d else 1 for k in range(tags.dim())])
    assert torch.equal(tags, expected)


# ------------------------------------------------------------------------------ operators without a rule

_SQUARE = Data((2, 4, 4), (1,))
_WHERE = Data((2, 6), (1,), below(6))
REFUSED: dict[str, list[Case]] = {
    "kthvalue": each(lambda x: x.kthvalue(2, 1)[0], IMAGE, refused=True),
    "take": each(torch.take, FEATURES, _WHERE, refused=True),
    "diagonal": each(lambda x: x.diagonal(0, 1, 2), _SQUARE, refused=True),
    "trace": each(torch.trace, Data((4, 4), (1,)), refused=True),
    "linalg_matrix_exp": each(torch.linalg.matrix_exp, _SQUARE, refused=True),
    "_cdist_forward": each(torch.cdist, FEATURES, FEATURES, refused=True),
    "linalg_cross": each(torch.linalg.cross, Data((2, 3), (1,)), Data((2, 3), (1,)), refused=True),
    "linalg_inv_ex": each(torch.linalg.inv, _SQUARE, refused=True),
}


@pytest.mark.parametrize("operator", list(REFUSED))
def test_an_operator_without_a_rule_freezes_what_it_reads_and_is_listed(operator: str) -> None:
    assert operator not in DECLARATIONS
    (row,) = REFUSED[operator]
    claimed = claim(row)
    assert violations(row, claimed) == []
    assert operator in claimed.facts.refused
    assert not claimed.classes


def test_an_operator_without_channels_is_not_listed() -> None:
    assert claim(case(lambda m, x: x.topk(2, 1)[0], image(dims=()))).facts.refused == {}


def test_an_operator_of_another_library_does_not_pass_for_one_of_torch() -> None:
    library = torch.library.Library("neuron_test", "FRAGMENT")
    library.define("flip(Tensor x, int[] dims) -> Tensor")
    library.impl("flip", lambda x, dims: x.clone(), "CompositeExplicitAutograd")
    row = case(lambda m, x: torch.ops.neuron_test.flip(x, [1]), IMAGE, refused=True)
    assert violations(row, claim(row)) == []


# -------------------------------------------------------------------------------------- the oracle itself


def _passing(*change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Flow, Op], None]:
    """A rule that passes the labels of dim 1, changed."""

    def wrong(flow: Flow, op: Op) -> None:
        labels = list(flow.labels(op.inputs()[0]))
        for function in change:
            labels[1] = function(labels[1])  # type: ignore[arg-type]
        flow.set(op.outputs[0], labels)

    return wrong


def _swapped_parts(flow: Flow, op: Op) -> None:
    first, second = (flow.labels(i)[1] for i in op.inputs())
    assert first is not None
    assert second is not None
    flow.set(op.outputs[0], [None, np.concatenate([second, first]), None, None])


def _groups_off_by_one(flow: Flow, op: Op) -> None:
    x, weight, *bias = op.inputs()
    source, rows = flow.labels(x)[1], flow.labels(weight)[0]
    assert source is not None
    assert rows is not None
    groups = int(op.arg("groups"))
    inputs, outputs = source.reshape(groups, -1), np.roll(rows.reshape(groups, -1), 1, axis=0)
    flow.tie(inputs, inputs[:, :1], op)
    flow.tie(outputs, inputs[:, :1], op)
    flow.group(op, op.arg("weight"), inputs[:, 0])
    flow.unify(rows, flow.labels(bias[0])[0], op)
    flow.produce(rows, op, weight)
    flow.set(op.outputs[0], [None, rows, None, None])


def _columns_not_read(flow: Flow, op: Op) -> None:
    original = DECLARATIONS["convolution"].rule
    assert original is not None
    original(flow, op)
    flow.facts.read.clear()


def _without_running_variance(flow: Flow, op: Op) -> None:
    labels = flow.labels(op.inputs()[0])
    for index in op.inputs()[1:4]:
        flow.unify(labels[1], flow.labels(index)[0], op)
    flow.set(op.outputs[0], labels)


def _mean_over_anything(flow: Flow, op: Op) -> None:
    labels, dims = flow.labels(op.inputs()[0]), op.arg("dim")
    flow.set(op.outputs[0], [label for d, label in enumerate(labels) if d not in dims])


def _all_alike(flow: Flow, op: Op) -> None:
    labels = flow.labels(op.inputs()[0])
    flow.tie(labels[1], labels[1][:1], op)  # type: ignore[arg-type, index]
    flow.set(op.outputs[0], labels)


def _frozen(flow: Flow, op: Op) -> None:
    flow.freeze(flow.labels(op.inputs()[0])[1], op, "for no reason")
    flow.set(op.outputs[0], flow.labels(op.inputs()[0]))


def _shuffled(x: torch.Tensor) -> torch.Tensor:
    return torch.channel_shuffle(x, 2)


def _unshuffled_order(label: np.ndarray) -> np.ndarray:
    return label.reshape(3, 2).T.reshape(-1)


WRONG: dict[str, tuple[str, Callable[[Flow, Op], None], Case, str]] = {
    "shuffle in the wrong order": ("channel_shuffle", _passing(_unshuffled_order), each(_shuffled, IMAGE)[0], ""),
    "shuffle forgotten": ("channel_shuffle", _passing(), each(_shuffled, IMAGE)[0], ""),
    "parts swapped": ("cat", _swapped_parts, moves.cat(IMAGE, image(3))[0], "output 0 differs"),
    "flip forgotten": ("flip", _passing(), each(lambda x: x.flip(1), IMAGE)[0], "output 0 differs"),
    "roll forgotten": ("roll", _passing(), each(lambda x: x.roll(1, 1), IMAGE)[0], "output 0 differs"),
    "groups off by one": (
        "convolution",
        _groups_off_by_one,
        compute.conv(compute.convolve, image(), (6, 3, 3, 3), 6, 2),
        "output 0 differs",
    ),
    "reader not noted": ("convolution", _columns_not_read, compute.CONTRACTION["convolution"][0], "not noted"),
    "mean over channels": ("mean", _mean_over_anything, each(lambda x: x.mean(1), IMAGE)[0], "output 0 differs"),
    "softmax over channels": ("_softmax", _passing(), each(lambda x: x.softmax(1), IMAGE)[0], "output 0 differs"),
    "parameter forgotten": (
        "batch_norm",
        _without_running_variance,
        compute.normed(compute.batch_norm, IMAGE)[0],
        "raises RuntimeError",
    ),
    "index off by one": (
        "slice",
        lambda flow, op: flow.set(op.outputs[0], [None, flow.labels(op.inputs()[0])[1][1:5], None, None]),  # type: ignore[index]
        # As one call: by Python's brackets, torch 2.6 slices the other dims, too.
        moves.following(lambda m, x: aten.slice(x, 1, 0, m.a), IMAGE, 1, 4)[0],
        "output 0 differs",
    ),
    "labels lost": (
        "relu",
        lambda flow, op: flow.set(op.outputs[0], [None] * 4),
        each(torch.relu, IMAGE)[0],
        "shape",
    ),
    "all tied": ("relu", _all_alike, each(torch.relu, IMAGE)[0], "are tied, but either can go alone"),
    "all frozen": ("relu", _frozen, each(torch.relu, IMAGE)[0], "must stay, but each of its indices can go"),
    "refused": (
        "relu",
        lambda flow, op: flow.refuse(op, "for no reason"),
        each(torch.relu, IMAGE)[0],
        "refused operators: ['relu']",
    ),
}


@pytest.mark.parametrize("mistake", list(WRONG))
def test_the_oracle_catches(mistake: str) -> None:
    operator, wrong, row, message = WRONG[mistake]
    assert violations(row, reaching(operator, row)) == []
    claimed = _claim_by(operator, wrong, row)
    found = violations(row, claimed)
    assert any(message in line for line in found), found
    assert found


def _claim_by(operator: str, wrong: Callable[[Flow, Op], None], row: Case) -> Claim:
    original = DECLARATIONS[operator].rule
    assert original is not None
    calls = []

    def once(flow: Flow, op: Op) -> None:
        with with_rule(operator, original):
            calls.append(op)
            wrong(flow, op)

    with with_rule(operator, once):
        claimed = claim(row)
    assert calls
    return claimed


def test_a_cautious_rule_has_to_be_cautious() -> None:
    row = each(torch.relu, IMAGE, cautious="so it is said")[0]
    assert violations(row, claim(row)) == ["the rule is tight, though it is said to be cautious: so it is said"]


def test_a_part_leaves_out_indices_of_one_dim_and_keeps_their_order() -> None:
    whole = torch.arange(24.0).view(2, 3, 4)
    assert is_part(whole, whole)
    assert is_part(whole, whole[:, [0, 2]])
    assert not is_part(whole, whole[:, [2, 0]])
    assert not is_part(whole, whole[:, [0, 0]])
    assert not is_part(whole, whole[:1, :, :2])
    assert not is_part(whole, whole + 1)
    assert not is_part(whole, whole[0])


# ------------------------------------------------------------------------------------ what rules note


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        (moves.cat(IMAGE, image(3))[0], ["concat"]),
        (each(lambda x, y: torch.stack([x, y], 1), IMAGE, IMAGE)[0], ["stack"]),
        (each(torch.add, IMAGE, IMAGE)[0], ["sum"]),
        (each(torch.sub, IMAGE, IMAGE)[0], ["sum"]),
        (each(torch.mul, IMAGE, IMAGE)[0], ["product"]),
        (each(lambda x: x * x.sigmoid(), IMAGE)[0], []),
        (each(torch.add, IMAGE, image(dims=()))[0], []),
        (case(lambda m, x: x + m.p, IMAGE, weights={"p": (6, 1, 1)}), []),
        (compute.conv(compute.convolve, image(), (6, 3, 3, 3), 6, 2), ["groups"]),
        (compute.conv(compute.convolve, image(), (6, 1, 3, 3), 6, 6), []),
    ],
)
def test_branches_meet(row: Case, kinds: list[str]) -> None:
    assert [join.kind for join in claim(row).joins] == kinds


def test_a_batch_norm_notes_its_scale() -> None:
    (row,) = compute.normed(compute.batch_norm, IMAGE)
    claimed = claim(row)
    ((label, name),) = claimed.facts.gammas
    assert name == "g"
    assert np.array_equal(label, claimed.tensors["g"][0])  # type: ignore[arg-type]


def test_batch_statistics_tie_pixels_except_in_training() -> None:
    (row,) = each(lambda x: F.batch_norm(x, None, None, training=True), Data((2, 6, 5), (2,)))
    assert not claim(row).classes
    assert len(claim(row, training=True).classes) == 5


def test_a_write_into_fresh_memory_leaves_it_free_to_follow() -> None:
    (row,) = each(lambda x: x * x.new_empty(x.shape).bernoulli_(1.0).add_(1), SIGNAL)
    assert len(claim(row).classes) == 6


def test_rows_of_a_table_stay_and_its_columns_may_go() -> None:
    row = case(lambda m, x: F.embedding(x, m.w), Data((2, 5), (), below(7)), weights={"w": (7, 6)})
    claimed = claim(row)
    assert [part.tolist() for part in claimed.classes] == [[slot] for slot in claimed.tensors["w"][1].tolist()]  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("add",), "operator add has a rule already: pointwise"),
        (("torchvision::roi_align",), "operator torchvision::roi_align has a rule already: roi_pool"),
        (("convolutoin",), "aten has no operator convolutoin"),
        (("torchvison::nms",), "torchvison has no operator nms"),
    ],
)
def test_a_wrong_registration_fails_at_once(names: tuple[str, ...], message: str) -> None:
    with scratch(), pytest.raises(ValueError, match=message):
        operator(*names)(lambda flow, op: None)


def test_a_registration_twice_in_one_call_fails() -> None:
    with scratch(), pytest.raises(ValueError, match="operator kthvalue has a rule already"):
        operator("kthvalue", "kthvalue")(lambda flow, op: None)


def test_names_that_an_older_torch_lacks_are_passed_over() -> None:
    with scratch():
        operator(recent=("kthvalue", "of_some_later_torch"))(lambda flow, op: None)
        assert "kthvalue" in DECLARATIONS
        assert "of_some_later_torch" not in DECLARATIONS


def test_a_registered_operator_is_found_in_place_too() -> None:
    assert operator_of(aten.relu_.default).declared is DECLARATIONS["relu"]
    assert operator_of(aten.sigmoid.default).declared is DECLARATIONS["add"]
    assert operator_of(aten.kthvalue.default).declared.rule is None
    assert operator_of(aten.equal.default).declared.rule is None, "one bool for all, whatever its tag says"


@pytest.fixture
def operator_of_ones_own() -> Iterator[str]:
    library = torch.library.Library("allocator_tests", "DEF")
    library.define("relu(Tensor x, int dim) -> Tensor")
    library.impl("relu", lambda x, dim: x.relu() + x.amax(dim, keepdim=True), "CompositeExplicitAutograd")
    yield "allocator_tests::relu"
    library._destroy()


class OfOnesOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(2, 8, 3), nn.Conv1d(8, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(torch.ops.allocator_tests.relu(self.first(x), 2))
        return y


def test_an_operator_of_ones_own_is_named_with_its_namespace_and_can_be_declared(operator_of_ones_own: str) -> None:
    x = torch.randn(1, 2, 16)
    with pytest.raises(allocator.NothingToAllocateError, match=r"no rule for this operator \(allocator_tests::relu\)"):
        allocator.allocate(OfOnesOwn().eval(), "60%", example_inputs=x)
    with scratch():
        operator(operator_of_ones_own)(lambda flow, op: flow.set(op.outputs[0], flow.labels(op.inputs()[0])))
        result = allocator.allocate(OfOnesOwn().eval(), "60%", example_inputs=x)
    assert result.certificate.ok
    assert result.graph.share() > 0.7

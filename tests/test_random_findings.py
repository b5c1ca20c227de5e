"""What random networks brought to light, each with the smallest network that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_checks import Case, check, check_model, count, example, require_equal
from random_layers import Hierarchy, Mixer, NonLocal, PerChannel
from random_networks import Spec, Step
from small_graphs import Net
from torch import Tensor, nn

import allocator

IMAGE = (3, 8, 8)
X = example(IMAGE)
Run = Callable[[Any, Tensor], Any]


def _net(run: Run, make: Callable[[], dict[str, nn.Module]]) -> nn.Module:
    """A network with random weights and batch norm statistics, the same at every call."""
    torch.manual_seed(0)
    model = Net(run, **make())
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.2, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    return model.eval()


def _unit(source: int, out: int, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(source, out, 3, padding=1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


def _head(channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


def _hold(run: Run, make: Callable[[], dict[str, nn.Module]], share: float = 0.6, **options: Any) -> str:
    """Hold all promises against a network, at a share of its FLOPs."""
    return check_model(_net(run, make), _net(run, make), X, Case(Spec(IMAGE, ()), share, **options))


def _smallest(model: nn.Module, **options: Any) -> allocator.Result:
    """What comes back at the smallest figure that can be reached."""
    with pytest.raises(allocator.BudgetError) as caught:
        allocator.allocate(model, 1, example_inputs=X, **options)
    assert caught.value.reachable is not None
    return allocator.allocate(model, caught.value.reachable, example_inputs=X, **options)


# Dead branches --------------------------------------------------------------------------------------


def _dead_branch(net: Any, x: Tensor) -> Tensor:
    y = net.stem(x)
    net.dead(y)
    return net.head(net.body(y))


def _dead_branch_layers() -> dict[str, nn.Module]:
    return {"stem": _unit(3, 8), "dead": _unit(8, 8, groups=2), "body": _unit(8, 8), "head": _head(8)}


def test_a_dead_branch_costs_nothing() -> None:
    """fvcore's trace drops calls that the outputs do not depend on; they were counted."""
    model = _net(_dead_branch, _dead_branch_layers)
    assert allocator.trace(model, X).flops == count(model, X)
    assert _hold(_dead_branch, _dead_branch_layers) == "result"


def _into_its_input(net: Any, x: Tensor) -> Tensor:
    y = net.stem(x)
    x += net.dead(y).mean(1, keepdim=True)
    return net.head(y)


def _into_a_buffer(net: Any, x: Tensor) -> Tensor:
    y = net.stem(x)
    net.seen[1].running_mean += net.dead(y).mean((0, 2, 3))
    return net.head(y)


def _into_what_is_split(net: Any, x: Tensor) -> Tensor:
    y = net.stem(x)
    first, second = y.split(4, 1)
    z = net.head(torch.cat([first, second], 1))
    y += net.dead(y)
    return z


def _into_a_view(net: Any, x: Tensor) -> Tensor:
    y = net.stem(x)
    part = y[:, :4]
    part += net.dead(y)[:, :4]
    return net.head(y)


def _into_what_is_sliced(net: Any, x: Tensor) -> Tensor:
    y = net.stem(x)
    z = net.head(torch.cat([y[:, :4], y[:, 4:]], 1))
    y += net.dead(y)
    return z


@pytest.mark.parametrize(
    ("run", "counts"),
    [
        (_into_its_input, True),
        (_into_a_buffer, True),
        (_into_what_is_split, True),
        (_into_a_view, True),
        (_into_what_is_sliced, False),
    ],
)
def test_what_only_a_write_reads(run: Run, counts: bool) -> None:
    """torch's tracer keeps a write that others could see, though no output depends on it; it was not counted."""
    model = _net(run, lambda: {"stem": _unit(3, 8), "dead": _unit(8, 8), "seen": _unit(3, 8), "head": _head(8)})
    own = allocator.trace(model, X).flops
    assert own == count(model, X)
    assert (own > 8 * 8 * 9 * 64) == counts


def test_the_groups_of_a_dead_convolution_are_a_block_without_cost() -> None:
    """They were looked up among the counted calls."""
    graph = allocator.trace(_net(_dead_branch, _dead_branch_layers), X)
    (groups,) = [block for block in graph.blocks if block.kind == "groups"]
    assert [branch.flops for branch in groups.branches] == [0, 0]


def test_channels_that_are_a_batch() -> None:
    """A convolution over each channel alone costs as much as there are channels; its batch was a constant."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.alone(net.stem(x)))

    def layers() -> dict[str, nn.Module]:
        return {"stem": _unit(3, 8), "alone": PerChannel(2, 8), "head": _head(8)}

    assert _hold(run, layers, share=0.7) == "result"


def test_a_layer_norm_says_its_size_as_a_file_does() -> None:
    """Its shape was a tuple, and a list when read back: not the same allocation."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.mixer(net.stem(x)))

    def layers() -> dict[str, nn.Module]:
        return {"stem": _unit(3, 8), "mixer": Mixer(8, 6, norm=True), "head": _head(8)}

    assert _hold(run, layers, norms="loose") == "result"


# Calls that depend on how a tensor lies in memory ---------------------------------------------------


def test_a_linear_layer_over_the_one_channel_that_is_left() -> None:
    """torch takes it apart in another way where a dim of size 1 makes its input contiguous."""

    def run(net: Any, x: Tensor) -> Tensor:
        tokens = net.stem(x).movedim(1, -1)
        return net.head(net.down(F.gelu(net.up(tokens))).movedim(-1, 1))

    model = _net(run, lambda: {"stem": _unit(3, 2), "up": nn.Linear(2, 6), "down": nn.Linear(6, 4), "head": _head(4)})
    result = _smallest(model, criterion="magnitude")
    assert result.model.get_parameter("up.weight").shape == (1, 1)
    assert not [note for note in result.notes if not note.startswith("held against the original in")]


# Repairs --------------------------------------------------------------------------------------------


def _two_slices(net: Any, x: Tensor) -> Tensor:
    y = net.stem(x)
    return net.head(net.body(y[:, :4]) + net.other(y[:, 2:]))


def _two_slices_layers() -> dict[str, nn.Module]:
    return {"stem": _unit(3, 8), "body": _unit(4, 8), "other": _unit(6, 8), "head": _head(8)}


def test_the_smallest_reachable_figure_was_seen_to_work() -> None:
    """It was that of a plan whose forward had not been tried: a slice by numbers needs its channels."""
    assert _hold(_two_slices, _two_slices_layers, share=0.1) == "budget"


def test_a_budget_that_a_wider_one_can_meet_is_no_model_without_neurons() -> None:
    """Two slices by numbers let the last channels go, not the first; at a small budget all were kept whole.

    The error said that no neuron can be removed.
    """

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.stem(x)
        return net.head(torch.cat([y[:, :4], y[:, 4:]], 1))

    def make() -> nn.Module:
        model = _net(run, lambda: {"stem": _unit(3, 8), "head": _head(8)})
        nn.init.constant_(model.get_parameter("stem.1.weight"), 1.0).mul_(torch.arange(8, 0, -1))
        return model

    with torch.no_grad():
        assert check_model(make(), make(), X, Case(Spec(IMAGE, ()), 0.3)) == "budget"
        result = _smallest(make())
    assert result.model.get_parameter("stem.0.weight").shape[0] == 5


def test_a_slice_that_became_the_whole_is_where_the_repair_is_made() -> None:
    """Of two channels `y[:, :4]` is all; the layer that then raised was kept whole instead."""
    result = allocator.allocate(_net(_two_slices, _two_slices_layers), "60%", example_inputs=X)
    *repairs, _ = result.notes  # the last says what the result holds for
    assert repairs
    assert all("slice" in note for note in repairs)
    assert result.model.get_parameter("body.0.weight").shape[0] < 8


class Halves(nn.Module):
    """Gives what half as many channels say twice, in the shape of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        half = self.narrow(x)
        return torch.stack([half, half.square()], 1).reshape(x.shape)


def test_layers_outside_the_block_that_does_not_fit_stay_free() -> None:
    """What a block's own convolution reads had to stay; so did the inputs of every other convolution."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.body(net.second(net.between(net.first(net.stem(x))))))

    def layers() -> dict[str, nn.Module]:
        blocks = {"first": Halves(), "between": _unit(8, 8), "second": Halves()}
        return {"stem": _unit(3, 8), **blocks, "body": nn.Sequential(_unit(8, 8), _unit(8, 8)), "head": _head(8)}

    assert _hold(run, layers) == "result"
    small = _smallest(_net(run, layers), scope="all").model
    stay = [small.get_parameter(f"{name}.narrow.weight").shape[:2] for name in ("first", "second")]
    assert stay == [(2, 4), (2, 4)], "as its shape is that of its input, it loses as many"
    assert small.get_parameter("body.0.0.weight").shape[0] < 8


def test_a_number_that_is_computed_from_a_size() -> None:
    """Nothing is lost at the division by the root of the number of keys, and no plan was found that ran."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.attend(net.stem(x)))

    def layers() -> dict[str, nn.Module]:
        return {"stem": _unit(3, 8), "attend": NonLocal(2, 8, 4, scaled=True), "head": _head(8)}

    small = _smallest(_net(run, layers), criterion="magnitude").model
    assert small.get_parameter("attend.query.weight").shape[0] == 4
    assert _hold(run, layers, share=0.9, criterion="magnitude") in ("result", "budget", "nothing")


def test_a_slice_that_comes_up_short_is_where_the_repair_is_made() -> None:
    """It gives what is there without a word; the linear layer that then raised was kept whole instead."""

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.stem(x)
        return net.head(net.body(y)) + net.linear(y[:, 6:].flatten(1))

    def layers() -> dict[str, nn.Module]:
        return {"stem": _unit(3, 8), "body": _unit(8, 8), "head": _head(8), "linear": nn.Linear(128, 3)}

    result = allocator.allocate(_net(run, layers), "60%", example_inputs=X, policy="global", scope="all")
    *repairs, _ = result.notes  # the last says what the result holds for
    assert repairs
    assert all("slice" in note for note in repairs)


def test_shapes_that_meta_tensors_let_through() -> None:
    """On them a transposed convolution takes any number of channels; a rule raised instead of the forward."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.up(net.stem(x)[:, ::2]))

    def layers() -> dict[str, nn.Module]:
        return {"stem": _unit(3, 8), "up": nn.ConvTranspose2d(4, 8, 2, 2), "head": _head(8)}

    assert _hold(run, layers, share=0.5, criterion="magnitude") in ("result", "budget")


def test_an_attribute_that_happens_to_equal_a_width_stays() -> None:
    """Two parts of two channels each: only the width follows the channels, not the number of parts."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.body(net.stem(x)))

    def layers() -> dict[str, nn.Module]:
        return {"stem": _unit(3, 4), "body": Hierarchy(2, 4, 2), "head": _head(4)}

    small = _smallest(_net(run, layers)).model.get_submodule("body")
    assert isinstance(small, Hierarchy)
    assert (small.parts, small.width) == (2, 1)
    assert _hold(run, layers, share=0.7) == "result"


def test_layers_that_share_a_weight_both_say_its_size() -> None:
    """The second one went by a name that the allocation does not have."""

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.stem(x)
        return net.head(net.second(net.first(y)) + y)

    def layers() -> dict[str, nn.Module]:
        first, second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        second.weight = first.weight
        return {"stem": _unit(3, 8), "first": first, "second": second, "head": _head(8)}

    assert _hold(run, layers) == "result"


# Forwards that look at values, or write -------------------------------------------------------------


def _simple_layers() -> dict[str, nn.Module]:
    return {"stem": _unit(3, 8), "body": _unit(8, 8), "head": _head(8)}


def test_a_forward_that_looks_at_values() -> None:
    """The rewritten model was traced without any."""

    def run(net: Any, x: Tensor) -> Tensor:
        y = net.body(net.stem(x * 0 if float(x.max()) > 1e9 else x))
        return net.head(y)

    assert _hold(run, _simple_layers) == "result"


def test_a_forward_that_counts_its_calls() -> None:
    """fvcore's run counted too, and the result's counter was no longer the original's."""

    def run(net: Any, x: Tensor) -> Tensor:
        net.stem[1].num_batches_tracked += 1
        return net.head(net.body(net.stem(x)))

    assert _hold(run, _simple_layers) == "result"


def test_a_forward_that_writes_into_its_input() -> None:
    """fvcore ran on the caller's tensor."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.body(net.stem(x.mul_(2))))

    assert _hold(run, _simple_layers) == "result"


# Outputs that hardly show what was dropped ----------------------------------------------------------


def test_what_only_large_inputs_switch_on_shows_on_them() -> None:
    """No input of the usual size gets past these biases, and a forward that looks at values keeps its own weights."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.body(x * 0 if float(x.max()) > 1e9 else x).relu())

    def layers() -> dict[str, nn.Module]:
        body = nn.Linear(8, 6)
        nn.init.normal_(body.weight, 0, 8**-0.5)
        nn.init.constant_(body.bias, -6)
        return {"body": body, "head": nn.Linear(6, 3)}

    with pytest.warns(allocator.AllocatorWarning):
        result = allocator.allocate(_net(run, layers), "70%", example_inputs=torch.zeros(1, 8), criterion="magnitude")
    assert result.certificate.shown
    assert result.certificate.effect is not None
    assert result.certificate.effect > 1e-3


def test_weights_of_one_seed_may_show_nothing() -> None:
    """After a softmax and a pool inputs hardly vary, and the drawn weights had both neurons of the hidden layer off."""
    steps = (
        Step("unit", (0,), {"out": 3, "norm": "batch"}),
        Step("transposed", (1,), {"out": 6, "groups": 3, "stride": 2, "transposed": True, "bias": True}),
        Step("hierarchy", (2,), {"parts": 2, "groups": 3}),
        Step("excite", (3,), {"inner": 4, "linear": True, "pool": "module"}, inline=True),
        Step("split", (4,), {"sizes": (5, 1), "how": "list"}),
        Step("hierarchy", (3,), {"parts": 2, "groups": 3}),
        Step("reorder", (7,), {"how": "softmax"}),
        Step("reorder", (4,), {"how": "softmax"}),
        Step("join", (5, 6, 8, 9), {"how": "cat"}),
    )
    spec = Spec((2, 8, 8), steps, head={"how": "pool", "hidden": 2}, form="tuple", seed=3, numbers="float64")
    assert check(Case(spec, 0.2, scope="all", fill=False, again=0.86), by_turns=True) == "budget"


def test_layers_that_are_off_show_on_drawn_weights_where_the_forward_looks_at_values() -> None:
    """Drawn weights may lead to another path, so that they were not tried; where the two agree on them they show it."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.body(x * 0 if float(x.max()) > 1e9 else x) * net.gate.weight.relu())

    model = _net(run, lambda: {"body": nn.Linear(8, 6), "gate": nn.Linear(6, 1, bias=False), "head": nn.Linear(6, 3)})
    nn.init.constant_(model.get_parameter("gate.weight"), -1)
    with pytest.warns(allocator.AllocatorWarning):
        result = allocator.allocate(model, "70%", example_inputs=torch.zeros(1, 8), criterion="magnitude")
    assert result.certificate.drawn
    assert result.certificate.shown


def test_a_mean_over_what_a_batch_norm_made_of_one_sample_shows_in_two() -> None:
    """It is the norm's shift, whatever the channels hold."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.norm(net.body(net.stem(x))).mean((2, 3))

    def layers() -> dict[str, nn.Module]:
        norm = nn.BatchNorm2d(5, track_running_stats=False)
        return {"stem": nn.Conv2d(3, 8, 3), "body": nn.Conv2d(8, 5, 1), "norm": norm}

    model = Net(run, **layers())
    assert allocator.allocate(model, "70%", example_inputs=X, criterion="magnitude").certificate.shown


def _first_half(net: Any, x: Tensor) -> Tensor:
    return net.head(net.stem(x)[:, :4])


def test_channels_that_nothing_reads_can_go() -> None:
    """Their effect on the outputs is none by nature; the result was refused, as no input showed any."""

    def make() -> nn.Module:
        model = _net(_first_half, lambda: {"stem": _unit(3, 8), "head": _head(4)})
        nn.init.constant_(model.get_parameter("stem.1.weight"), 1.0)[4:].div_(10)
        return model

    with torch.no_grad():
        result = allocator.allocate(make(), "70%", example_inputs=X, scope="all")
        assert check_model(make(), make(), X, Case(Spec(IMAGE, ()), 0.7, scope="all")) == "result"
    assert (result.certificate.effect, result.certificate.unread) == (0.0, True)
    assert "none of them reads the dropped neurons" in str(result.certificate)


def _where_off(net: Any, x: Tensor) -> Tensor:
    return torch.where(net.gate > 0, net.head(net.stem(x)), x.mean((1, 2, 3))[:, None])


def _written_off(net: Any, x: Tensor) -> Tensor:
    y = net.head(net.stem(x))
    y[(net.gate < 0).expand_as(y)] = 1
    return y


def _off(net: Any, x: Tensor) -> Tensor:
    return net.head((net.stem(x) - 1e9).relu())


@pytest.mark.parametrize("run", [_where_off, _written_off, _off])
def test_what_is_merely_off_is_not_unread(run: Run) -> None:
    """A gate that is shut on all inputs that were tried may open on others."""

    def layers() -> dict[str, nn.Module]:
        net = nn.Module()
        net.gate = nn.Parameter(torch.tensor(-1.0))
        return {"stem": _unit(3, 8), "head": _head(8), "holds": net}

    model = _net(lambda net, x: run(net, x), layers)
    model.gate = model.get_parameter("holds.gate")
    with pytest.raises(allocator.CertificateError, match="none of them was seen to depend"):
        allocator.allocate(model, "70%", example_inputs=X)


# Allocating again -----------------------------------------------------------------------------------


def test_a_layer_whose_class_is_another_by_now_is_known_to_the_check() -> None:
    """Attention that lost heads is of a class made from torch's; allocated again, its sizes change as before."""
    steps = (Step("unit", (0,), {"out": 12, "norm": "batch"}), Step("attention", (1,), {"heads": 1}))
    assert check(Case(Spec((1, 8, 8), steps), 0.6, again=0.5)) == "result"


def _grouped(net: Any, x: Tensor) -> Tensor:
    return net.head(net.body(net.stem(x)))


def _grouped_layers() -> dict[str, nn.Module]:
    return {"stem": _unit(3, 8), "body": _unit(8, 8, groups=2), "head": _head(8)}


@pytest.mark.parametrize("groups", ["whole", "width"])
def test_groups_that_became_ordinary_channels_compose(groups: str) -> None:
    """One group that is left is an ordinary convolution; groups of one channel are a depthwise one.

    What a neuron is changes on the way, so that the two allocations in one were no allocation to `verify`, and
    their rows for the grouped weight did not go with its outputs.
    """
    model = _net(_grouped, _grouped_layers)
    first = _smallest(model, groups=groups)
    second = _smallest(first.model, groups="whole")
    assert second.flops_after < first.flops_after
    both = first.allocation.compose(second.allocation)
    require_equal(allocator.apply(model, both), second.model, X)
    assert allocator.verify(model, second.model, both, example_inputs=X).ok
    assert not allocator.verify(model, first.model, both, example_inputs=X).ok


def test_a_composed_allocation_whose_parts_say_otherwise_fails() -> None:
    """The parts are what is verified, so they must give the whole."""
    model = _net(_grouped, _grouped_layers)
    first = _smallest(model, groups="width")
    second = _smallest(first.model)
    both = first.allocation.compose(second.allocation)
    both.kept["head.2.weight"] = [None, [7 - both.kept["head.2.weight"][1][0]]]  # type: ignore[index]
    assert not allocator.verify(model, second.model, both, example_inputs=X).ok


class _Dead(nn.Module):
    """What comes out of some calls is read by nobody; they run all the same."""

    def __init__(self, dead: nn.Module) -> None:
        super().__init__()
        self.first, self.dead = nn.Conv2d(3, 8, 3), dead
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        self.dead(x)
        return self.head(x.mean((2, 3)))


class _Listed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, [0, 2, 7]]


class _Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(torch.fft.fft(x, dim=1).real)


@pytest.mark.parametrize("dead", [_Listed, _Spectrum])
def test_what_nobody_reads_still_runs(dead: type[nn.Module]) -> None:
    """Meta tensors let through an index past the end and a weight with fewer rows than groups."""
    model = _Dead(dead()).eval()
    with pytest.raises(allocator.NothingToAllocateError, match=r"picked by an index|grouped convolution"):
        allocator.allocate(model, "50%", example_inputs=torch.randn(1, 3, 8, 8))


def _written_copy(net: Any, x: Tensor) -> Tensor:
    y = net.stem(x)
    shuffled = y.view(len(y), 2, 4, 8, 8).transpose(1, 2).reshape(len(y), 8, 8, 8)
    shuffled += net.aside(shuffled)
    return net.head(y)


def _written_copy_layers() -> dict[str, nn.Module]:
    return {"stem": _unit(3, 8), "aside": _unit(8, 8, groups=8), "head": _head(8)}


def test_a_write_into_what_was_laid_out_anew_is_counted() -> None:
    """Torch's tracer takes what `reshape` gives for a view, also where it is a copy that nobody reads."""
    model = _net(_written_copy, _written_copy_layers)
    assert allocator.trace(model, X).flops == count(model, X)


def test_a_branch_that_would_lose_all_it_reads_keeps_a_channel() -> None:
    """Torch gives a transposed convolution of nothing a shape of its own, which no rule expects."""
    unit, split = Step("unit", (0,), {"out": 4, "norm": "batch"}), Step("split", (1,), {"sizes": (3, 1), "how": "code"})
    options = {"out": 5, "groups": 1, "stride": 2, "transposed": True, "bias": False}
    spec = Spec((1, 16), (unit, split, Step("transposed", (3,), options)), head={"how": "flatten", "hidden": 0})
    assert check(Case(spec, 0.5, policy="global", scope="all", exclude=("head",))) == "budget"


def test_a_spec_is_checked_like_a_model() -> None:
    """The checks see a network that has all of it at once."""
    steps = (
        Step("unit", (0,), {"out": 8, "norm": "batch"}),
        Step("hierarchy", (1,), {"parts": 2, "groups": 1}),
        Step("excite", (2,), {"inner": 3, "linear": True, "pool": "mean"}),
        Step("join", (1, 3), {"how": "add", "target": None}),
        Step("join", (4, 2), {"how": "cat", "target": 16}),
        Step("again", (1,), {"step": 1}),
        Step("join", (5, 6), {"how": "cat", "target": None}, inline=True),
    )
    assert check(Case(Spec(IMAGE, steps, extra="aux", training=True), 0.5)) == "result"

"""Random networks: drawn as plain data by hypothesis, built from the pieces in random_layers.py.

A `Spec` is a program: every step reads maps made before it and adds one or several. Maps that nothing reads
are dead branches; a step may call the module of an earlier step again, or share its weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from random_layers import (
    ACTIVATIONS,
    Attention,
    Flat,
    Gate,
    Head,
    Hierarchy,
    Join,
    Mixer,
    NonLocal,
    PixelShuffle,
    Project,
    Reorder,
    Resize,
    Scale,
    Selective,
    Shuffle,
    Slice,
    Spatial,
    Split,
    SqueezeExcite,
    Standardised,
    Unit,
)
from torch import Tensor, nn

Shape = tuple[int, ...]
Options = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]
MAX_CHANNELS = 16
MAX_SIDE = {1: 32, 2: 16, 3: 8}


@dataclass(frozen=True)
class Step:
    """One module and the maps it reads.

    Attributes:
        kind: a key of `KINDS`, "again" for the module of an earlier step, or "tied" for one with its weight.
        reads: indices of maps; 0 is the input.
        options: what the module is made with.
        inline: its forward runs as part of the network's own, unseen by hooks.
    """

    kind: str
    reads: tuple[int, ...]
    options: Options = field(default_factory=dict)
    inline: bool = False


@dataclass(frozen=True)
class Spec:
    """A network as data.

    Attributes:
        shape: of the input without batch: (channels, *sides).
        steps: what is computed, in order.
        outputs: indices of maps that are returned after the head's logits.
        head: options of the head on the last map, or None for none.
        form: "tensor", "tuple" or "dict": how outputs are returned.
        extra: "aux" for a head that runs in train mode only, "idle" for a layer that never runs, "counter" for
            a forward that counts its calls, "values" for one that looks at its input's values, or "".
        seed: of the weights.
        training: whether the model is handed over in train mode.
    """

    shape: Shape
    steps: tuple[Step, ...]
    outputs: tuple[int, ...] = ()
    head: Options | None = field(default_factory=lambda: {"how": "pool"})
    form: str = "tensor"
    extra: str = ""
    seed: int = 0
    training: bool = False


class Assembly:
    """Modules made step by step, with the maps they give; for building a network and for drawing one."""

    def __init__(self, shape: Shape) -> None:
        self.modules: list[nn.Module] = []
        self.calls: list[tuple[int, tuple[int, ...], bool]] = []
        self.channels: list[list[int]] = []
        self.maps = [torch.zeros(1, *shape)]

    def add(self, step: Step) -> None:
        """Make the step's module and run it; an error leaves all as it was."""
        reads = [self.maps[i] for i in step.reads]
        index, module = self._module(step, [tuple(x.shape[1:]) for x in reads])
        made = _run(module.eval(), reads, False)
        if index == len(self.modules):
            self.modules.append(module)
            self.channels.append([x.shape[1] for x in reads])
        self.calls.append((index, step.reads, step.inline))
        self.maps += made

    def shape(self, index: int) -> Shape:
        """(channels, *sides) of a map."""
        return tuple(self.maps[index].shape[1:])

    def _module(self, step: Step, shapes: list[Shape]) -> tuple[int, nn.Module]:
        options = dict(step.options)
        if step.kind == "again":
            index = self.calls[options["step"]][0]
            if self.channels[index] != [shape[0] for shape in shapes]:
                raise ValueError("the module was made for other channels")
            return index, self.modules[index]
        if step.kind == "tied":
            first = self.modules[self.calls[options.pop("step")][0]]
            assert isinstance(first, Unit)
            module = Unit(len(shapes[0]) - 1, shapes[0][0], first.conv.weight.shape[0], **options)
            if module.conv.weight.shape != first.conv.weight.shape:
                raise ValueError("the weights differ in shape")
            module.conv.weight = first.conv.weight
            return len(self.modules), module
        return len(self.modules), KINDS[step.kind].build(shapes, options)


class Network(nn.Module):
    """What a `Spec` describes."""

    counter: Tensor

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        made = Assembly(spec.shape)
        for step in spec.steps:
            made.add(step)
        self.steps, self.calls = nn.ModuleList(made.modules), made.calls
        self.outputs, self.form = spec.outputs, spec.form
        self.middle = len(made.maps) // 2
        self.head = None if spec.head is None else Head(made.shape(-1), **spec.head)
        self.aux = Head(made.shape(self.middle), "pool", hidden=3) if spec.extra == "aux" else None
        self.extra = spec.extra
        if spec.extra == "idle":
            self.idle = nn.Linear(5, 2)
        elif spec.extra == "counter":
            self.runs = 0
            self.register_buffer("counter", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        maps = [x]
        for index, reads, inline in self.calls:
            maps += _run(self.steps[index], [maps[i] for i in reads], inline)
        if self.extra == "counter":
            self.runs += 1
            self.counter += 1
        elif self.extra == "values" and float(x.abs().max()) > 1e9:
            maps[-1] = maps[-1] * 0
        found = [] if self.head is None else [self.head(maps[-1])]
        found += [maps[i] for i in self.outputs]
        if self.aux is not None and self.training:
            found.append(self.aux(maps[self.middle]))
        if self.form == "dict":
            return {f"out{i}": value for i, value in enumerate(found)}
        return found[0] if self.form == "tensor" and len(found) == 1 else tuple(found)


def _run(module: nn.Module, maps: list[Tensor], inline: bool) -> list[Tensor]:
    made = module.forward(*maps) if inline else module(*maps)
    return list(made) if isinstance(made, tuple) else [made]


def build(spec: Spec) -> Network:
    """The network of a spec, with weights and batch norm statistics drawn from its seed."""
    state = torch.random.get_rng_state()
    torch.manual_seed(spec.seed)
    try:
        net = Network(spec)
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                _randomise(module)
    finally:
        torch.random.set_rng_state(state)
    return net.train(spec.training)


def _randomise(norm: nn.modules.batchnorm._NormBase) -> None:
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.2, 1.5)
        nn.init.normal_(norm.bias, 0, 0.5)
    if norm.running_mean is not None and norm.running_var is not None:
        nn.init.normal_(norm.running_mean, 0, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)


# Kinds of steps -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How to draw and build one kind of step.

    Attributes:
        options: draws the options for inputs of these shapes, or gives None where they don't allow it.
        build: makes the module for inputs of these shapes.
        reads: smallest and largest number of inputs.
    """

    options: Callable[[Draw, list[Shape]], Options | None]
    build: Callable[[list[Shape], Options], nn.Module]
    reads: tuple[int, int] = (1, 1)


def _one_of(draw: Draw, *choices: Any) -> Any:
    return draw(st.sampled_from(choices))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _unit(draw: Draw, shapes: list[Shape]) -> Options | None:
    (channels, *sides), options = shapes[0], {}
    norms = ("batch", "batch", "batch", "batch", "batch", "batch", "none", "plain", "stats", "group", "instance")
    options["norm"] = _one_of(draw, *norms)
    options["act"] = _one_of(draw, *ACTIVATIONS)
    options["first"] = _one_of(draw, False, False, False, True)
    options["bias"] = _one_of(draw, False, True)
    options["kernel"] = _one_of(draw, 3, 1)
    if min(sides) >= 4:
        options["stride"] = _one_of(draw, 1, 1, 2)
        options["dilation"] = _one_of(draw, 1, 1, 2)
    options["groups"] = groups = _one_of(draw, 1, 1, *_divisors(channels))
    options["out"] = groups * draw(st.integers(-(-2 // groups), max(12 // groups, 2)))
    return options if options["out"] <= MAX_CHANNELS else None


def _depthwise(draw: Draw, shapes: list[Shape]) -> Options | None:
    options = _unit(draw, shapes)
    if options is not None:
        options["groups"] = channels = shapes[0][0]
        options["out"] = channels * _one_of(draw, 1, 1, 2)
    return options


def _transposed(draw: Draw, shapes: list[Shape]) -> Options | None:
    channels, *sides = shapes[0]
    if 2 * max(sides) > MAX_SIDE[len(sides)]:
        return None
    groups = _one_of(draw, 1, *_divisors(channels))
    out = groups * draw(st.integers(1, max(8 // groups, 1)))
    return {"out": out, "groups": groups, "stride": 2, "transposed": True, "bias": _one_of(draw, False, True)}


def _build_unit(shapes: list[Shape], options: Options) -> nn.Module:
    rest = dict(options)
    return Unit(len(shapes[0]) - 1, shapes[0][0], rest.pop("out"), **rest)


def _join(draw: Draw, shapes: list[Shape]) -> Options | None:
    how = _one_of(draw, "cat", "add", "cat", "mul", "sub", "max", "in place")
    total = sum(shape[0] for shape in shapes) if how == "cat" else shapes[0][0]
    if total > 3 * MAX_CHANNELS:
        return None
    return {"how": how, "target": _one_of(draw, None, None, total)}


def _build_join(shapes: list[Shape], options: Options) -> nn.Module:
    return Join(len(shapes[0]) - 1, [shape[0] for shape in shapes], **options)


def _split(draw: Draw, shapes: list[Shape]) -> Options | None:
    channels = shapes[0][0]
    how = _one_of(draw, "int", "chunk", "list", "pair", "code")
    if how in ("int", "chunk"):
        counts = [d for d in _divisors(channels) if 1 < d <= 4]
        if not counts:
            return None
        parts = _one_of(draw, *counts)
        return {"sizes": (channels // parts,) * parts, "how": how}
    if channels < 2:
        return None
    first = draw(st.integers(1, channels - 1))
    return {"sizes": (first, channels - first), "how": how}


def _factored(draw: Draw, channels: int) -> int | None:
    factors = [d for d in _divisors(channels) if 1 < d < channels]
    return _one_of(draw, *factors) if factors else None


def _shuffle(draw: Draw, shapes: list[Shape]) -> Options | None:
    groups = _factored(draw, shapes[0][0])
    return groups and {"groups": groups, "how": _one_of(draw, "tensor", "module", "attribute")}  # type: ignore[return-value]


def _hierarchy(draw: Draw, shapes: list[Shape]) -> Options | None:
    parts = _factored(draw, shapes[0][0])
    if parts is None:
        return None
    return {"parts": parts, "groups": _one_of(draw, 1, 1, *_divisors(shapes[0][0] // parts))}


def _excite(draw: Draw, shapes: list[Shape]) -> Options:
    inner, linear = draw(st.integers(1, 6)), _one_of(draw, False, True)
    return {"inner": inner, "linear": linear, "pool": _one_of(draw, "module", "mean", "max")}


def _resize(draw: Draw, shapes: list[Shape]) -> Options | None:
    sides = shapes[0][1:]
    hows = ["blur", *(["max", "avg"] if min(sides) >= 4 else [])]
    hows += ["nearest", "linear"] if 2 * max(sides) <= MAX_SIDE[len(sides)] else []
    return {"how": _one_of(draw, *hows)}


def _slice(draw: Draw, shapes: list[Shape]) -> Options | None:
    channels = shapes[0][0]
    if channels < 2:
        return None
    return {
        "count": draw(st.integers(1, channels - 1)),
        "how": _one_of(draw, "first", "last", "narrow", "other"),
    }


def _reorder(draw: Draw, shapes: list[Shape]) -> Options | None:
    hows = ["flip", "roll", "index", "pad", "cumsum", "softmax", "normalise", "fft"]
    if shapes[0][0] <= MAX_CHANNELS // 2:
        hows += ["repeat", "interleave"]
    return {"how": _one_of(draw, *hows)}


def _pixels(draw: Draw, shapes: list[Shape]) -> Options | None:
    channels, *sides = shapes[0]
    if len(sides) != 2:
        return None
    if channels % 4 == 0 and 2 * max(sides) <= MAX_SIDE[2] and _one_of(draw, True, False):
        return {"up": True}
    return {"up": False} if channels <= 4 and all(n % 2 == 0 for n in sides) else None


def _non_local(draw: Draw, shapes: list[Shape]) -> Options | None:
    if math.prod(shapes[0][1:]) > 256:
        return None
    return {"inner": draw(st.integers(1, 6)), "scaled": _one_of(draw, False, True)}


def _attention(draw: Draw, shapes: list[Shape]) -> Options | None:
    channels, *sides = shapes[0]
    return {"heads": _one_of(draw, *_divisors(channels))} if math.prod(sides) <= 256 else None


def _flat(draw: Draw, shapes: list[Shape]) -> Options | None:
    return {"inner": draw(st.integers(2, 8))} if math.prod(shapes[0]) <= 1024 else None


def _sized(piece: Callable[..., nn.Module], *, rank: bool = True) -> Callable[[list[Shape], Options], nn.Module]:
    """A builder for a piece that takes (rank,) channels and its options."""

    def make(shapes: list[Shape], options: Options) -> nn.Module:
        channels, *sides = shapes[0]
        return piece(*([len(sides)] if rank else []), channels, **options)

    return make


KINDS: dict[str, Kind] = {
    "unit": Kind(_unit, _build_unit),
    "depthwise": Kind(_depthwise, _build_unit),
    "transposed": Kind(_transposed, _build_unit),
    "join": Kind(_join, _build_join, (2, 4)),
    "split": Kind(_split, lambda _, options: Split(**options)),
    "shuffle": Kind(_shuffle, _sized(Shuffle, rank=False)),
    "hierarchy": Kind(_hierarchy, _sized(Hierarchy)),
    "excite": Kind(_excite, _sized(SqueezeExcite)),
    "resize": Kind(_resize, lambda shapes, options: Resize(len(shapes[0]) - 1, **options)),
    "slice": Kind(_slice, _sized(Slice, rank=False)),
    "reorder": Kind(_reorder, _sized(Reorder, rank=False)),
    "scale": Kind(lambda draw, _: {}, _sized(Scale)),
    "gate": Kind(lambda draw, _: {"how": _one_of(draw, "own", "glu", "chunk")}, _sized(Gate)),
    "spatial": Kind(lambda draw, _: {}, lambda shapes, _: Spatial(len(shapes[0]) - 1)),
    "selective": Kind(lambda draw, _: {"out": draw(st.integers(2, 8))}, _sized(Selective)),
    "mixer": Kind(
        lambda draw, _: {"inner": draw(st.integers(2, 12)), "norm": _one_of(draw, False, True)},
        _sized(Mixer, rank=False),
    ),
    "non_local": Kind(_non_local, _sized(NonLocal)),
    "project": Kind(
        lambda draw, _: {"out": draw(st.integers(2, 8)), "how": _one_of(draw, "matmul", "einsum")},
        _sized(Project, rank=False),
    ),
    "attention": Kind(_attention, _sized(Attention, rank=False)),
    "flat": Kind(_flat, lambda shapes, options: Flat(shapes[0], **options)),
    "pixels": Kind(_pixels, lambda _, options: PixelShuffle(**options)),
    "standardised": Kind(lambda draw, _: {"out": draw(st.integers(2, 8))}, _sized(Standardised)),
}
# How often each kind is drawn.
_WEIGHTS = {"unit": 10, "depthwise": 4, "join": 12, "split": 4, "shuffle": 3, "hierarchy": 4, "excite": 3, "slice": 3}
_WEIGHTS |= {"resize": 3, "again": 5, "tied": 3, "transposed": 3, "gate": 2, "selective": 2, "mixer": 2, "flat": 2}
_WEIGHTS |= {"project": 2, "non_local": 2}
_MENU = [kind for kind in (*KINDS, "again", "tied") for _ in range(_WEIGHTS.get(kind, 1))]


# Drawing a spec -------------------------------------------------------------------------------------


@st.composite
def specs(draw: Draw, ranks: tuple[int, ...] = (2, 2, 2, 1, 3), most: int = 9) -> Spec:
    """Networks of up to `most` steps after a first convolution with batch norm."""
    rank = draw(st.sampled_from(ranks))
    side = {1: 16, 2: 8, 3: 4}[rank] * draw(st.sampled_from((1, 1, 2)))
    shape = (draw(st.integers(1, 4)), *[side] * rank)
    with torch.device("meta"):
        made = Assembly(shape)
        steps = [Step("unit", (0,), {"out": draw(st.integers(2, 12)), "norm": "batch"})]
        made.add(steps[0])
        for _ in range(draw(st.integers(1, most))):
            step = _draw_step(draw, steps, made)
            if step is not None:
                try:
                    made.add(step)
                except (ValueError, RuntimeError):  # this step does not run on what it reads
                    continue
                steps.append(step)
    return _draw_end(draw, shape, steps, made)


def _draw_step(draw: Draw, steps: list[Step], made: Assembly) -> Step | None:
    kind = draw(st.sampled_from(_MENU))
    inline = _one_of(draw, False, False, True)
    if kind in ("again", "tied"):
        return _draw_repeat(draw, kind, steps, made, inline)
    low, high = KINDS[kind].reads
    reads = tuple(_draw_map(draw, made) for _ in range(draw(st.integers(low, high))))
    options = KINDS[kind].options(draw, [made.shape(i) for i in reads])
    return None if options is None else Step(kind, reads, options, inline)


def _draw_repeat(draw: Draw, kind: str, steps: list[Step], made: Assembly, inline: bool) -> Step | None:
    """A module that is called again, or one that shares its weight, on maps with the same channels."""
    index = draw(st.integers(0, len(steps) - 1))
    first = steps[index]
    options: Options = {"step": index}
    if kind == "tied":
        if first.kind not in ("unit", "depthwise", "transposed"):
            return None
        same = ("kernel", "groups", "norm", "transposed", "stride")
        options |= {key: value for key, value in first.options.items() if key in same}
    reads = []
    for source in first.reads:
        fits = [i for i in range(1, len(made.maps)) if made.shape(i)[0] == made.shape(source)[0]]
        if not fits:
            return None
        reads.append(draw(st.sampled_from(fits[::-1])))
    return Step(kind, tuple(reads), options, inline)


def _draw_map(draw: Draw, made: Assembly) -> int:
    """A map, the latest ones more often; the input only while there is nothing else."""
    back = draw(st.sampled_from((1, 1, 1, 2, 2, 3, 4, 5, 6, 8, 10)))
    return max(len(made.maps) - back, 1)


def _draw_end(draw: Draw, shape: Shape, steps: list[Step], made: Assembly) -> Spec:
    last = made.shape(-1)
    how = _one_of(draw, "pool", "pool", "flatten")
    head: Options | None = {"how": how, "hidden": _one_of(draw, 0, 0, draw(st.integers(2, 8)))}
    outputs: tuple[int, ...] = ()
    if _one_of(draw, False, False, False, True):
        outputs = tuple(_draw_map(draw, made) for _ in range(draw(st.integers(1, 2))))
        head = _one_of(draw, head, None)
    if head is not None and math.prod(last) > 2048:
        head["how"] = "pool"
    form = _one_of(draw, "tensor", "tuple", "dict")
    extra = _one_of(draw, "", "", "", "", "aux", "idle", "counter", "values")
    return Spec(shape, tuple(steps), outputs, head, form, extra, draw(st.integers(0, 9)), draw(st.booleans()))

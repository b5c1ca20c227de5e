"""Random networks as plain data, built from the pieces in random_layers.py; random_specs.py draws them.

A `Spec` is a program: every step reads maps made before it and adds one or several. Maps that nothing reads
are dead branches; a step may call the module of an earlier step again, or share its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from random_layers import (
    Attention,
    Flat,
    Gate,
    Head,
    Hierarchy,
    Join,
    Mixer,
    NonLocal,
    PerChannel,
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
Builder = Callable[[list[Shape], Options], nn.Module]


@dataclass(frozen=True)
class Step:
    """One module and the maps it reads.

    Attributes:
        kind: a key of `BUILDERS`, "again" for the module of an earlier step, or "tied" for one with its weight.
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
        numbers: "float32", "float64", "bfloat16", or "channels_last" for float32 in that memory format.
    """

    shape: Shape
    steps: tuple[Step, ...]
    outputs: tuple[int, ...] = ()
    head: Options | None = field(default_factory=lambda: {"how": "pool"})
    form: str = "tensor"
    extra: str = ""
    seed: int = 0
    training: bool = False
    numbers: str = "float32"


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
        return len(self.modules), BUILDERS[step.kind](shapes, options)


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
    return convert(net, spec.numbers).train(spec.training)


def convert(what: Any, numbers: str) -> Any:
    """A module or a tensor in the dtype or memory format that a spec names."""
    if numbers == "channels_last":
        return what.to(memory_format=torch.channels_last)
    return what.to(getattr(torch, numbers))


def _randomise(norm: nn.modules.batchnorm._NormBase) -> None:
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.2, 1.5)
        nn.init.normal_(norm.bias, 0, 0.5)
    if norm.running_mean is not None and norm.running_var is not None:
        nn.init.normal_(norm.running_mean, 0, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)


# How a step of each kind is made from the shapes that it reads and its options ---------------------------


def _build_unit(shapes: list[Shape], options: Options) -> nn.Module:
    rest = dict(options)
    return Unit(len(shapes[0]) - 1, shapes[0][0], rest.pop("out"), **rest)


def _sized(piece: Callable[..., nn.Module], *, rank: bool = True) -> Builder:
    """A builder for a piece that takes (rank,) channels and its options."""

    def make(shapes: list[Shape], options: Options) -> nn.Module:
        channels, *sides = shapes[0]
        return piece(*([len(sides)] if rank else []), channels, **options)

    return make


BUILDERS: dict[str, Builder] = {
    "unit": _build_unit,
    "depthwise": _build_unit,
    "transposed": _build_unit,
    "join": lambda shapes, options: Join(len(shapes[0]) - 1, [shape[0] for shape in shapes], **options),
    "split": lambda _, options: Split(**options),
    "shuffle": _sized(Shuffle, rank=False),
    "hierarchy": _sized(Hierarchy),
    "excite": _sized(SqueezeExcite),
    "resize": lambda shapes, options: Resize(len(shapes[0]) - 1, **options),
    "slice": _sized(Slice, rank=False),
    "reorder": _sized(Reorder, rank=False),
    "scale": _sized(Scale),
    "gate": _sized(Gate),
    "spatial": lambda shapes, _: Spatial(len(shapes[0]) - 1),
    "selective": _sized(Selective),
    "mixer": _sized(Mixer, rank=False),
    "non_local": _sized(NonLocal),
    "project": _sized(Project, rank=False),
    "attention": _sized(Attention, rank=False),
    "flat": lambda shapes, options: Flat(shapes[0], **options),
    "per_channel": _sized(PerChannel),
    "pixels": lambda _, options: PixelShuffle(**options),
    "standardised": _sized(Standardised),
}

"""Hypothesis strategies that draw the random networks of random_networks.py, and checks run on what is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from random_layers import ACTIVATIONS
from random_networks import Assembly, Options, Shape, Spec, Step

Draw = Callable[[st.SearchStrategy[Any]], Any]
T = TypeVar("T")
MAX_CHANNELS = 16
MAX_SIDE = {1: 32, 2: 16, 3: 8}


# Options of each kind of step, for inputs of these shapes; None where they do not allow it ---------------


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
    options["out"] = groups * _one_of(draw, *range(max(12 // groups, 2), -(-2 // groups) - 1, -1))
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


def _join(draw: Draw, shapes: list[Shape]) -> Options | None:
    how = _one_of(draw, "cat", "add", "cat", "mul", "sub", "max", "in place")
    total = sum(shape[0] for shape in shapes) if how == "cat" else shapes[0][0]
    if total > 3 * MAX_CHANNELS:
        return None
    return {"how": how, "target": _one_of(draw, None, None, total)}


def _split(draw: Draw, shapes: list[Shape]) -> Options | None:
    channels = shapes[0][0]
    how = _one_of(draw, "int", "chunk", "list", "pair", "code", "rest", "tensor_split")
    if how == "rest":  # the last part is what is left
        width = draw(st.integers(1, channels))
        return {"sizes": (width,) * (channels // width) + (channels % width,) * (channels % width > 0), "how": "int"}
    if how in ("int", "chunk", "tensor_split"):
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
        "how": _one_of(draw, "first", "last", "narrow", "other", "negative", "list"),
    }


def _reorder(draw: Draw, shapes: list[Shape]) -> Options | None:
    hows = ["flip", "roll", "index", "pad", "cumsum", "softmax", "normalise", "fft", "unbind", "where", "stack", "crop"]
    hows += ["maxout", "groups"] if shapes[0][0] % 2 == 0 else []
    hows += ["bilinear"] if len(shapes[0]) == 2 else ["swap"] if max(shapes[0][1:]) <= MAX_CHANNELS else []
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


OPTIONS: dict[str, Callable[[Draw, list[Shape]], Options | None]] = {
    "unit": _unit,
    "depthwise": _depthwise,
    "transposed": _transposed,
    "join": _join,
    "split": _split,
    "shuffle": _shuffle,
    "hierarchy": _hierarchy,
    "excite": _excite,
    "resize": _resize,
    "slice": _slice,
    "reorder": _reorder,
    "scale": lambda draw, _: {},
    "gate": lambda draw, _: {"how": _one_of(draw, "own", "glu", "chunk")},
    "spatial": lambda draw, _: {},
    "selective": lambda draw, _: {"out": draw(st.integers(2, 8))},
    "mixer": lambda draw, _: {"inner": draw(st.integers(2, 12)), "norm": _one_of(draw, False, True)},
    "non_local": _non_local,
    "project": lambda draw, _: {"out": draw(st.integers(2, 8)), "how": _one_of(draw, "matmul", "einsum")},
    "attention": _attention,
    "flat": _flat,
    "per_channel": lambda draw, _: {},
    "pixels": _pixels,
    "standardised": lambda draw, _: {"out": draw(st.integers(2, 8))},
}
# How often each kind is drawn.
_WEIGHTS = {"unit": 10, "depthwise": 4, "join": 12, "split": 4, "shuffle": 3, "hierarchy": 4, "excite": 3, "slice": 3}
_WEIGHTS |= {"resize": 3, "again": 5, "tied": 3, "transposed": 3, "gate": 2, "selective": 2, "mixer": 2, "flat": 2}
_WEIGHTS |= {"project": 2, "non_local": 2, "reorder": 3}
_MENU = [kind for kind in (*OPTIONS, "again", "tied") for _ in range(_WEIGHTS.get(kind, 1))]


# Drawing a spec -------------------------------------------------------------------------------------


@st.composite
def specs(draw: Draw, ranks: tuple[int, ...] = (2, 2, 2, 1, 3), most: int = 9) -> Spec:
    """Networks of up to `most` steps after a first convolution with batch norm."""
    rank = draw(st.sampled_from(ranks))
    side = {1: 16, 2: 8, 3: 4}[rank] * draw(st.sampled_from((1, 1, 2)))
    shape = (draw(st.integers(1, 4)), *[side] * rank)
    with torch.device("meta"):
        made = Assembly(shape)
        steps = [Step("unit", (0,), {"out": _one_of(draw, *range(12, 1, -1)), "norm": "batch"})]
        made.add(steps[0])
        for _ in range(draw(st.integers(1, most))):
            _add(_draw_step(draw, steps, made), steps, made)
        _add(_draw_gathering(draw, steps, made), steps, made)
    return _draw_end(draw, shape, steps, made)


def _add(step: Step | None, steps: list[Step], made: Assembly) -> None:
    if step is not None:
        try:
            made.add(step)
        except (ValueError, RuntimeError):  # this step does not run on what it reads
            return
        steps.append(step)


def _draw_gathering(draw: Draw, steps: list[Step], made: Assembly) -> Step | None:
    """Three times of four, branches that would end dead meet in one last step."""
    read = {i for step in steps for i in step.reads}
    ends = [i for i in range(1, len(made.maps)) if i not in read][-4:]
    if len(ends) < 2 or not _one_of(draw, True, True, True, False):
        return None
    how = "cat" if sum(made.shape(i)[0] for i in ends) <= 3 * MAX_CHANNELS else "add"
    return Step("join", tuple(ends), {"how": how})


def _draw_step(draw: Draw, steps: list[Step], made: Assembly) -> Step | None:
    kind = draw(st.sampled_from(_MENU))
    inline = _one_of(draw, False, False, True)
    if kind in ("again", "tied"):
        return _draw_repeat(draw, kind, steps, made, inline)
    count = draw(st.integers(2, 4)) if kind == "join" else 1
    reads = tuple(_draw_map(draw, made) for _ in range(count))
    options = OPTIONS[kind](draw, [made.shape(i) for i in reads])
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
    """A map, the latest ones more often; the input never."""
    back = draw(st.sampled_from((0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 7, 9)))
    last = len(made.maps) - 1
    return last - back % last


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
    numbers = "float32"
    if len(shape) < 4 and not any(step.options.get("how") == "fft" for step in steps):  # these know no bfloat16
        more = "channels_last" if len(shape) == 3 else "float64"
        numbers = _one_of(draw, "float32", "float32", "float32", "float64", "bfloat16", more)
    seed, training = draw(st.integers(0, 9)), draw(st.booleans())
    return Spec(shape, tuple(steps), outputs, head, form, extra, seed, training, numbers)


def for_examples(
    strategy: st.SearchStrategy[T], number: int, examples: int, check: Callable[[T], None], *, shrink: bool = False
) -> None:
    """Call a check on so many draws, of which the first is the simplest; the same ones for a number."""
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=phases,
        print_blob=False,
    )
    @given(strategy)
    def run(drawn: T) -> None:
        check(drawn)

    run()

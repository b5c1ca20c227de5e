"""How fvcore counts `einsum`: two equations by hand, the rest read off numpy's printed report."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from allocator.cost.terms import Product
from allocator.flow.flow import Flow
from allocator.flow.labels import Label
from allocator.tracing.calls import Call

_COUNTED_BY_HAND = ("abc,abd->acd", "abc,adc->adb")


def einsum_flops(flow: Flow, call: Call) -> list[Product]:
    """Two FLOPs per combination of letters where any are summed over, else one; fvcore halves them.

    Three operands and more are contracted in the order that is best for their sizes: a step has a product in the order
    as traced, and the last product counts the whole anew.
    """
    equation = str(call.args[0]).replace(" ", "")
    refs = call.args[1] if isinstance(call.args[1], tuple) else call.args[1:]
    operands, result = _spelled(equation, [len(flow.shape(ref.index)) for ref in refs])
    letters: dict[str, tuple[int, Label]] = {}
    for names, ref in zip(operands, refs, strict=True):
        for letter, size, label in zip(names, flow.shape(ref.index), flow.labels(ref.index), strict=True):
            largest, labelled = letters.get(letter, (1, None))
            letters[letter] = (max(size, largest), labelled if label is None else label)
    if _alphabetical(equation) in _COUNTED_BY_HAND:
        return [_combinations(letters, set(letters), 1)]
    steps = _steps(operands, result, {name: size for name, (size, _) in letters.items()})
    products = [_combinations(letters, used, scale)._replace(printed=True) for used, scale in steps]
    if len(operands) < 3:
        return products
    whole = _combinations(letters, set(letters), 0)
    return [*products, whole._replace(printed=True, recount=_counted_anew(operands, result, letters))]


def _counted_anew(
    operands: list[list[str]], result: list[str], letters: dict[str, tuple[int, Label]]
) -> Callable[..., int]:
    """The count of all steps by the sizes of the letters that have labels, in the order that is best for these."""
    fixed = {name: size for name, (size, label) in letters.items() if label is None}
    labelled = [name for name in letters if name not in fixed]

    @functools.cache
    def count(*sizes: int) -> int:
        size_of = {**fixed, **dict(zip(labelled, sizes, strict=True))}
        if 0 in sizes:
            return 0
        steps = _steps(operands, result, size_of)
        return sum(scale * math.prod(size_of[name] for name in used) for used, scale in steps)

    return count


def _combinations(letters: dict[str, tuple[int, Label]], used: set[str], scale: int) -> Product:
    plain, labels = scale, []
    for name, (size, label) in letters.items():
        if name not in used:
            continue
        if label is None:
            plain *= size
        else:
            labels.append(label)
    return Product(plain, labels)


def _spelled(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Letters of each operand and of the result, with one for every dim that dots stand for."""
    inputs, arrow, output = equation.partition("->")
    if not arrow:
        plain = inputs.replace(",", "").replace("...", "")
        output = "..." * ("..." in inputs) + "".join(sorted(c for c in set(plain) if plain.count(c) == 1))
    names = inputs.split(",")
    dots = max((_dims_of_dots(n, rank) for n, rank in zip(names, ranks, strict=True) if "..." in n), default=0)

    def spell(letters: str, count: int) -> list[str]:
        before, mark, after = letters.partition("...")
        dotted = [f"dot{k}" for k in range(dots - count, dots)] if mark else []
        return [*before, *dotted, *after]

    spelled = [spell(n, _dims_of_dots(n, rank)) for n, rank in zip(names, ranks, strict=True)]
    return spelled, spell(output, dots)


def _dims_of_dots(letters: str, rank: int) -> int:
    """How many dims of an operand of this rank its three dots stand for."""
    return rank - (len(letters) - len("..."))


def _alphabetical(equation: str) -> str:
    """The equation in the letters a, b, c ... as they come."""
    order = dict.fromkeys(c for c in equation if c.isalpha())
    return equation.translate({ord(c): ord("a") + i for i, c in enumerate(order)})


def _steps(operands: list[list[str]], result: list[str], sizes: dict[str, int]) -> Iterator[tuple[set[str], int]]:
    """Per step of numpy's best path: the letters used, and how often a combination of these counts."""
    number = {name: i for i, name in enumerate(sizes)}
    arguments: list[Any] = []
    for names in operands:
        shape = [sizes[name] for name in names]
        arguments += [np.broadcast_to(0.0, shape), [number[name] for name in names]]
    path = np.einsum_path(*arguments, [number[name] for name in result], optimize="optimal")[0]
    left = [set(names) for names in operands]
    for step in path[1:]:
        taken = [left.pop(i) for i in sorted(step, reverse=True)]
        used = set().union(*taken)
        stays = used & set(result).union(*left)
        left.append(stays)
        yield used, max(1, len(taken) - 1) + (stays != used)

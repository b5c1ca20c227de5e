"""What the operators of a TorchScript forward come to: worked out where all is known, and else steps of a program.

The operators named here are those of TorchScript's own language, its arithmetic and its lists; tensors meet them under
the same names, and then they are steps like any other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from allocator.io.programs.program import MOST_STEPS, Program, Step, function_of
from allocator.io.programs.torchscript_source import unsupported
from allocator.io.programs.torchscript_values import (
    DTYPE,
    Effort,
    Value,
    is_computed,
    is_followed,
    is_number,
    is_undecided,
    sample_of,
    undecided,
)
from allocator.torch_private import overload_for, schema_of

_LARGEST = 2**62
_DROPPED = ("device", "layout", "pin_memory", "memory_format")  # the defaults serve
_AS_USUAL = object()
"""What a rule gives that does not apply."""


def _on_numbers(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The same for two numbers alone: of a list or a text, `2**40 *` would fill the memory."""

    def apply(a: Any, b: Any) -> Any:
        if not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
            raise unsupported(f"works out {function.__name__} of {a!r:.40} and {b!r:.40}")
        return function(a, b)

    return apply


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, list) and isinstance(b, list):
        return [*a, *b]
    return _on_numbers(operator.add)(a, b)


def _copy(items: Any) -> list[Any]:
    if not isinstance(items, list):  # a range may be of any length
        raise unsupported(f"copies {items!r:.40}")
    return list(items)


# What is worked out where every argument is known.
_KNOWN: dict[str, Callable[..., Any]] = {
    "__and__": _on_numbers(operator.and_),
    "__contains__": lambda items, item: item in items,
    "__derive_index": lambda index, start, step: start + index * step,
    "__is__": operator.is_,
    "__isnot__": operator.is_not,
    "__not__": operator.not_,
    "__or__": _on_numbers(operator.or_),
    "__range_length": lambda low, high, step: len(range(low, high, step)),
    "add": _add,
    "copy": _copy,
    "div": _on_numbers(operator.truediv),
    "eq": operator.eq,
    "floordiv": _on_numbers(operator.floordiv),
    "ge": _on_numbers(operator.ge),
    "gt": _on_numbers(operator.gt),
    "le": _on_numbers(operator.le),
    "len": len,
    "lt": _on_numbers(operator.lt),
    "mul": _on_numbers(operator.mul),
    "ne": operator.ne,
    "neg": operator.neg,
    "remainder": _on_numbers(operator.mod),
    "sub": _on_numbers(operator.sub),
}
# Arithmetic on numbers that the input decides, by what it is called in Python's `operator`.
_ON_SIZES = {name: name for name in ("add", "sub", "mul", "floordiv", "neg", "eq", "ne", "ge", "gt", "le", "lt")}
_ON_SIZES |= {"floor_divide": "floordiv", "remainder": "mod"}


class Operators:
    """The calls of one forward.

    Attributes:
        steps: what the program has to do, in order.
        branches: how many undecided branches the call lies in; none of them may change a list for the other.
    """

    def __init__(self, program: Program, constants: Sequence[Any], effort: Effort) -> None:
        self.program, self.effort = program, effort
        self.steps: list[Step] = []
        self.branches = 0
        self._numbers = {id(tensor): number for number, tensor in enumerate(constants)}
        self._made = 0

    def call(self, dotted: str, args: list[Any], keywords: dict[str, Any]) -> Any:
        """What an operator gives.

        Args:
            dotted: its whole name, such as ``torch.add``.
            args, keywords: known, or `Value`.
        """
        self.effort.weigh([*args, *keywords.values()])
        home, _, name = dotted.rpartition(".")
        rule = _RULES.get(dotted) or _RULES.get(name)
        result = _AS_USUAL if rule is None else rule(self, args)
        if result is not _AS_USUAL:
            return result
        if name in _KNOWN and not is_computed([*args, *keywords.values()]):
            return self._bounded(_KNOWN[name](*args))
        if name == "rsub":
            name, args = "sub", [args[1], args[0], *args[2:]]
        if name in _KNOWN and any(map(is_undecided, args)) and not any(map(is_followed, args)):
            return undecided("number")
        if name in _ON_SIZES and all(map(is_number, args[:2])) and args[2:] in ([], [1]):
            return self._on_sizes(_ON_SIZES[name], args[:2])
        if home not in ("torch", "ops.aten"):
            raise unsupported(f"calls {dotted:.80}, which is no ATen operator")
        if name == "_convolution":  # the same with flags for the choice of a kernel
            return self._aten("convolution", args[:9], keywords)
        return self._aten("sym_size" if name == "size" else name, args, keywords)

    def step(self, target: str, given: dict[str, Any], keywords: list[str], kind: str | tuple[str, ...]) -> Any:
        """A call in the program; what it gives.

        Args:
            target: as exported programs name it.
            given: arguments by name.
            keywords: those that are passed by name.
            kind: what comes out, one by one where it is several.
        """
        if len(self.steps) == MOST_STEPS:
            raise unsupported(f"makes more than {MOST_STEPS:,} calls")
        results = self._fresh() if isinstance(kind, str) else [self._fresh() for _ in kind]
        step = Step(target, results)
        step.keywords = keywords
        for name, value in given.items():
            step.order.append(name)
            if not is_computed(value):
                setattr(step, f"arg_{name}", list(value) if isinstance(value, tuple) else value)
            elif isinstance(value, (list, tuple)):
                step.names[name] = [self._name(entry) for entry in value]
            else:
                step.names[name] = self._name(value)
        self.steps.append(step)
        if isinstance(kind, str):
            return Value(str(results), kind)
        return tuple(Value(result, each) for result, each in zip(results, kind))

    def _on_sizes(self, name: str, args: list[Any]) -> Any:
        """Arithmetic on numbers that the input decides, such as its size."""
        if any(map(is_undecided, args)):
            return undecided("number")
        args = [arg.item() if isinstance(arg, torch.Tensor) else arg for arg in args]
        return self.step(f"_operator.{name}", dict(zip("ab", args)), [], "int")

    def _aten(self, name: str, args: list[Any], keywords: dict[str, Any]) -> Any:
        """A call of an ATen operator, by the overload that torch itself would choose."""
        keywords = {key: value for key, value in keywords.items() if key not in _DROPPED}
        samples = {key: sample_of(value) for key, value in keywords.items()}
        try:
            overload = overload_for(name, [sample_of(arg) for arg in args], samples)
        except RuntimeError as error:
            raise unsupported(f"calls torch.{name:.80} in a way that this torch does not know") from error
        target = f"torch.ops.aten.{name}.{overload}"
        function_of(target)  # raises where it does more than compute with tensors
        schema = schema_of(getattr(getattr(torch.ops.aten, name), overload))
        given = {schema.arguments[i].name: value for i, value in enumerate(args)} | keywords
        if given.get("train") is True or (name == "batch_norm" and given.get("training") is True):
            raise unsupported("was traced in training mode (call .eval() before torch.jit.trace)")
        kinds = tuple(str(result.type) for result in schema.returns)
        return self.step(target, given, list(keywords), kinds[0] if len(kinds) == 1 else kinds)

    def _bounded(self, value: Any) -> Any:
        """A number or list that was worked out; a file may ask for huge ones."""
        if isinstance(value, list):
            self.effort.weigh(value)
        if (isinstance(value, int) and abs(value) > _LARGEST) or (isinstance(value, list) and len(value) > 10_000):
            raise unsupported("works out a number or a list beyond all bounds")
        return value

    def _fresh(self) -> str:
        self._made += 1
        return f"#{self._made}"

    def _name(self, value: Any) -> Any:
        """How a step refers to a value: by its name where it is computed."""
        if isinstance(value, torch.Tensor):
            return self._constant(value)
        if isinstance(value, Value) and not value.name:
            raise unsupported("computes with its input's number of dims")
        return value.name if isinstance(value, Value) else value

    def _constant(self, tensor: torch.Tensor) -> str:
        """The name of a tensor of the code's own, which the program holds from its first use on."""
        number = self._numbers.get(id(tensor))
        if number is None:
            raise unsupported("keeps tensors in a list or by names of its own")
        name = f"constants.c{number}"
        if f"%{name}" not in self.program.held:
            self.program.hold(f"%{name}", name, tensor, persistent=False)
        return f"%{name}"


# ------------------------------------------------------------------------------------------ operators of their own kind


def _raise(operators: Operators, args: list[Any]) -> Any:
    raise unsupported(f"raises {args[1:]}")


def _text(operators: Operators, args: list[Any]) -> Any:
    """Texts are for messages."""
    return ""


def _same(operators: Operators, args: list[Any]) -> Any:
    return args[0]


def _dtype(operators: Operators, args: list[Any]) -> Any:
    return DTYPE


def _count(operators: Operators, args: list[Any]) -> Any:
    """The number of dims, or of entries, of what the input decides."""
    return undecided("int") if isinstance(args[0], Value) else _AS_USUAL


def _cast(operators: Operators, args: list[Any]) -> Any:
    """To the input's type, which is that of the weights: nothing to do."""
    return args[0] if DTYPE in args[1:] else _AS_USUAL


def _is_none(operators: Operators, args: list[Any]) -> Any:
    """What the input decides is there."""
    return False if isinstance(args[0], Value) and args[1] is None else _AS_USUAL


def _is_not_none(operators: Operators, args: list[Any]) -> Any:
    return True if isinstance(args[0], Value) and args[1] is None else _AS_USUAL


def _append(operators: Operators, args: list[Any]) -> Any:
    """In place; not in a branch that may not be taken."""
    if not isinstance(args[0], list) or operators.branches:
        return _AS_USUAL
    args[0].append(args[1])
    operators.effort.weigh(args[0])
    return None


_RULES: dict[str, Callable[[Operators, list[Any]], Any]] = {
    "ops.prim.NumToTensor": _same,
    "ops.prim.RaiseException": _raise,
    "ops.prim.dtype": _dtype,
    "torch.device": _same,
    "torch.format": _text,
    "torch.warn": _text,
    "__is__": _is_none,
    "__isnot__": _is_not_none,
    "append": _append,
    "dim": _count,
    "len": _count,
    "to": _cast,
}

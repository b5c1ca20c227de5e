"""What is known of an operator: what torch says in its schema, and what this package declares beside that.

The declarations themselves are in `allocator.operators`, one file per family; this is the table that they fill. Nothing
else in the package asks for an operator by its name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from allocator.torch_private import OpOverload, schema_of

Rule = Callable[[Any, Any], None]
R = TypeVar("R", bound=Rule)
_LOADED_LATER = ("torchvision",)  # its operators are there once it is imported


@dataclass(frozen=True, slots=True)
class Declaration:
    """What this package knows of an operator, beside its schema.

    Attributes:
        rule: how channels pass through it, a function of the flow and the call; None where nobody has said.
        flops: what fvcore counts for it, a function of the flow and the call; None where it counts nothing.
        multiplies: which of the tensors that it reads are the multiplied ones, the weight second; () for none.
        read_dim: the dim of the weight that is summed over with the other.
        written_dim: the dim of its result that the weight writes; None where no single dim is.
        window: kernel, stride and dilation per axis, a function of the flow and the call, for what slides over pixels.
        sized: it takes sizes as integers, so that these may differ once channels are gone.
        splits: it takes a tensor apart along one dim.
        copies: it gives what it was given.
        reshapes: it gives what it was given in another shape.
        restrides: where shapes are the same it gives what it was given, laid out in memory in another way.
        stands_for: calls of one such family do the same; which of them runs depends on how large a tensor is, and on
            how it lies in memory.
        on_meta: given its arguments, its result on meta tensors, or None for torch to find it.
        pointwise: it works number by number, though torch does not tag it so.
        largest: how it runs on tensors without values, where a size depends on them: with the largest that can be.
        value_sized: whether the size of a call's result depends on values, a function of the trace and the call.
        creates: it makes a tensor out of numbers alone, so that a program in a file may call it without one.
        draws: it draws random numbers, or may, though torch does not tag it so.
        alike: given its arguments by name, what it could have drawn, which does not depend on how many channels there
            are: a number, a tensor, or all results; None where it is left to draw.
        drawn_as: a few words for a drawing of the network; "" for what is not drawn.
    """

    rule: Rule | None = None
    flops: Callable[[Any, Any], Sequence[Any]] | None = None
    multiplies: tuple[int, ...] = ()
    read_dim: int | None = None
    written_dim: int | None = None
    window: Callable[[Any, Any], tuple[Any, Any, Any]] | None = None
    sized: bool = False
    splits: bool = False
    copies: bool = False
    reshapes: bool = False
    restrides: bool = False
    stands_for: str = ""
    on_meta: Callable[..., Any] | None = None
    pointwise: bool = False
    largest: Callable[[Any, Any, Any], Any] | None = None
    value_sized: Callable[[Any, Any], bool] | None = None
    creates: bool = False
    draws: bool = False
    alike: Callable[[dict[str, Any]], Any] | None = None
    drawn_as: str = ""


@dataclass(frozen=True, slots=True)
class Function:
    """What this package knows of a Python function of torch's whose parts alone would not tell what it is.

    Attributes:
        name: its name, without underscores around it.
        whole: it is recorded as one call, beside the ATen calls it is made of.
        flops: what fvcore counts for the whole, a function of the flow and the call; None where the parts count.
        multiplies: it is a matrix product, whose last part gives its result.
        takes_apart: it gives views of its first tensor in a list, which torch's own tracer never loses.
        orders: it puts numbers in order, so that the last bits of equals decide.
        rounds: it gives whole numbers in place of any, so that its results say little of what they were.
        draws: it draws from the process's generator of random numbers, or may.
        trusts: it reads places by numbers, and one that is no number may end the process.
        asserts: it is asked whether the forward may go on, and by nothing else: it may, where there are no values.
        callable: the function, where a program that names its ATen operator is to call it instead.
        in_parts: does the same in operators that are followed, where torch may fuse it into one of a device's own.
    """

    name: str
    whole: bool = True
    flops: Callable[[Any, Any], Sequence[Any]] | None = None
    multiplies: bool = False
    takes_apart: bool = False
    orders: bool = False
    rounds: bool = False
    draws: bool = False
    trusts: bool = False
    asserts: bool = False
    callable: Callable[..., Any] | None = None
    in_parts: Callable[..., Any] | None = None


DECLARATIONS: dict[str, Declaration] = {}
"""By the operator's name in `torch.ops.aten`, or with its namespace (`torchvision::nms`)."""
FUNCTIONS: dict[str, Function] = {}
"""By the function's name."""
AS_ONE_CALL: dict[Callable[..., Any], Callable[..., tuple[Any, tuple[Any, ...]] | None]] = {}
"""Functions that are recorded as a single ATen call: given their arguments, that call, or None to look inside."""
_POINTWISE: list[Declaration] = []  # at most one: for what torch tags as pointwise and nobody declared


def operator(*names: str, recent: tuple[str, ...] = (), for_pointwise: bool = False, **traits: Any) -> Callable[[R], R]:
    """Declare the named operators, all their overloads and the twins that work in place; decorates their rule.

    Args:
        names: operator names as in `torch.ops.aten`, or `torchvision::roi_align` for another namespace, such as that of
            operators of your own.
        recent: names that the oldest torch this package runs on does not have; there they are passed over.
        for_pointwise: the declaration also holds for every operator that torch tags as pointwise.
        traits: further fields of `Declaration`.

    Raises:
        ValueError: a name is declared already, or is no operator of this torch.
    """

    def register(rule: R) -> R:
        declaration = Declaration(rule, **traits)
        declare(declaration, *names, *(name for name in recent if hasattr(torch.ops.aten, name)))
        if for_pointwise:
            _POINTWISE.append(declaration)
        return rule

    return register


def declare(declaration: Declaration, *names: str) -> None:
    """Declare operators without decorating anything; raises like `operator`."""
    for name in names:
        if name in DECLARATIONS:
            rule = DECLARATIONS[name].rule
            raise ValueError(f"operator {name} has a rule already: {getattr(rule, '__name__', 'none')}")
        namespace, _, own = name.rpartition("::")
        if namespace not in _LOADED_LATER and not hasattr(getattr(torch.ops, namespace or "aten"), own):
            raise ValueError(f"{namespace or 'aten'} has no operator {own}")
        DECLARATIONS[name] = declaration
    operator_of.cache_clear()  # what was looked up before was not declared then


def function(name: str, **traits: Any) -> None:
    """Declare a function; `traits` are further fields of `Function`.

    Raises:
        ValueError: it is declared already.
    """
    if name in FUNCTIONS:
        raise ValueError(f"function {name} is declared already")
    FUNCTIONS[name] = Function(name, **traits)


@dataclass(frozen=True, slots=True)
class Operator:
    """One overload: what torch says of it, and what is declared.

    Attributes:
        name: its name without overload, such as `convolution`; with its namespace where that is one of your own.
        arguments: position and default of each argument, by its name.
        writes: whether it changes one of its inputs in place.
        gives_views: whether a result shares the memory of an input.
        lists_views: whether it takes its first input apart into a list of views.
        reshapes: whether it gives an input another shape in place.
        pointwise: whether it works number by number.
        draws: whether it draws random numbers, or may.
        declared: what this package knows of it.
    """

    name: str
    arguments: dict[str, tuple[int, Any]]
    writes: bool
    gives_views: bool
    lists_views: bool
    reshapes: bool
    pointwise: bool
    draws: bool
    declared: Declaration

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call by their names, with the defaults of those that it leaves out."""
        named = {name: default for name, (_, default) in self.arguments.items()}
        return {**named, **dict(zip(named, args, strict=False)), **kwargs}


@functools.cache
def operator_of(target: OpOverload) -> Operator:
    """What is known of an overload such as `aten.convolution.default`."""
    schema = schema_of(target)
    first = schema.arguments[0].alias_info if schema.arguments else None
    namespace, _, own = schema.name.partition("::")
    declared = _declaration(target)
    return Operator(
        name=own if namespace in ("aten", *_LOADED_LATER) else schema.name,
        arguments={a.name: (i, a.default_value) for i, a in enumerate(schema.arguments)},
        writes=bool(schema.is_mutable),
        gives_views=any(result.alias_info is not None for result in schema.returns),
        lists_views=first is not None and "*" in first.after_set,
        reshapes=torch.Tag.inplace_view in target.tags,
        pointwise=torch.Tag.pointwise in target.tags or declared.pointwise,
        draws=torch.Tag.nondeterministic_seeded in target.tags or declared.draws,
        declared=declared,
    )


def _declaration(target: OpOverload) -> Declaration:
    """Of the operator, else of its twin that does not work in place, else that of all pointwise ones."""
    name = schema_of(target).name.removeprefix("aten::")
    declared = DECLARATIONS.get(name)
    if declared is None and name.endswith("_"):
        declared = DECLARATIONS.get(name[:-1])
    if declared is None and torch.Tag.pointwise in target.tags and _gives_tensors(target):
        declared = next(iter(_POINTWISE), None)
    return declared or _UNDECLARED


_UNDECLARED = Declaration()


def _gives_tensors(target: OpOverload) -> bool:
    """`equal` is tagged as pointwise, though it gives one bool for all."""
    return all("Tensor" in str(result.type) for result in schema_of(target).returns)

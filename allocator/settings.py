"""How neurons are chosen: every option once, with its values, default and meaning.

The keyword arguments of `allocator.allocate`, the flags of the command line, the keys of a recipe's YAML and the table
in the documentation are all made from this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from allocator.errors import ArgumentsError, InputError, UnknownNameError, as_given, none_of

Policy = Literal["auto", "per_block", "global", "uniform", "isomorphic", "priced"]
Scope = Literal["auto", "branches", "inner", "all", "narrowest"]
Groups = Literal["auto", "whole", "width"]
Norms = Literal["exact", "loose"]
Weights = Literal["keep", "reset"]
Method = Literal["auto", "least_squares", "batch_norm", "fold", "distil"]
Init = Literal["zero", "copy"]
Certify = bool | Literal["small", "full"]
Limit = float | str | None

PREFIXES = ("torchvision", "timm", "recipe", "hf", "ultralytics")
"""Libraries that name networks, in the order in which messages list them."""


@dataclass(frozen=True)
class Option:
    """What is said of an option wherever people choose it.

    Attributes:
        help: what it decides and what its values mean.
        flag: how the command line names it, where that is not by its name.
        metavar: what stands for a value that is none of a few words.
    """

    help: str
    flag: str = ""
    metavar: str = ""


@dataclass(frozen=True)
class Settings:
    """How neurons are chosen; `Option` says what each means."""

    policy: Annotated[
        Policy | str,
        Option(
            "who competes with whom: per_block (the branches of a block), global (all neurons), isomorphic (layers "
            "that are alike), uniform (none: every branch keeps the same share), priced (all, by score per cost), or "
            "auto for what suits the criterion: priced where its scores add up, per_block for bn_scale, else global"
        ),
    ] = "auto"
    criterion: Annotated[
        Any,
        Option(
            "what ranks neurons, such as group_norm, bn_scale or fisher; several are averaged; auto is group_norm, or, "
            "where data are given, whichever of fisher, group_norm and activation does best on them",
            metavar="NAME",
        ),
    ] = "auto"
    scope: Annotated[
        Scope,
        Option(
            "which neurons may go: branches (those that enter a concatenation or a grouped convolution), inner (all "
            "but residual streams), all, narrowest (of these, that can meet the budget), or auto, which is all"
        ),
    ] = "auto"
    fill: Annotated[
        bool, Option("keep plain shares; do not spend the rest of the budget on the next best neurons", flag="no-fill")
    ] = True
    groups: Annotated[
        Groups,
        Option(
            "in grouped convolutions, drop whole groups (whole), narrow all of them alike (width), or auto, which is "
            "whole, and width where whole groups cannot meet the budget"
        ),
    ] = "auto"
    norms: Annotated[
        Norms,
        Option(
            "keep channels under a norm over channels (exact; of a group norm, whole groups may go), or let them go "
            "(loose)"
        ),
    ] = "exact"
    exclude: Annotated[
        Sequence[Any],
        Option("leave modules of this name alone, as in 'layer4*' (repeat for more)", metavar="PATTERN"),
    ] = ()

    include: Annotated[
        Sequence[Any],
        Option("leave everything alone but modules of this name (repeat for more)", metavar="PATTERN"),
    ] = ()
    same: Annotated[
        Sequence[Any],
        Option(
            "layers of this name stay alike: they keep the same places (repeat for more that go with them)",
            metavar="PATTERN",
        ),
    ] = ()
    at_least: Annotated[
        Any,
        Option(
            "how many channels a layer keeps at least: a number, or a share such as 25%; in Python and YAML also one "
            "per name pattern. Left out, 'auto' with prices keeps 40% of each, less under tight budgets; 0: any number",
            metavar="N",
        ),
    ] = None
    multiple: Annotated[
        int, Option("widths of layers are multiples of this, such as 8, where they change at all", metavar="N")
    ] = 1

    @classmethod
    def named(cls, given: Mapping[str, Any]) -> Settings:
        """Settings by their names.

        Raises:
            ArgumentsError: there is none of a name.
        """
        for name in given:
            if name not in OPTIONS:
                raise ArgumentsError(none_of("argument", name, OPTIONS))
        return cls(**given)

    def checked(self) -> Settings:
        """These settings, if all of them can be.

        Raises:
            UnknownNameError: a value that is none of an option's.
            InputError: `multiple` is no number above zero, or `at_least` has a key that is no pattern.
        """
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for pattern in self.at_least if isinstance(self.at_least, Mapping) else ():
            if not isinstance(pattern, str):
                raise InputError(f"at_least has the key {as_given(pattern)}: its keys are name patterns")
        if not isinstance(self.multiple, int) or not 1 <= self.multiple < LARGEST_MULTIPLE:
            raise InputError(f"multiple={as_given(self.multiple)} is no whole number above zero, such as 8")
        return self


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise UnknownNameError unless an option's value is one of its choices."""
    if not isinstance(value, str) or value not in choices:  # an array says of each of its numbers whether it is one
        raise UnknownNameError(none_of(name, value, choices))


def check_certify(value: Any) -> None:
    """Raise InputError unless it says whether outputs are compared, and at which size."""
    if not isinstance(value, bool) and not (isinstance(value, str) and value in SIZES):
        raise InputError(f"certify={as_given(value)} is none of {', '.join(map(repr, SIZES))}, True or False")


@dataclass(frozen=True)
class Limits:
    """Budgets: what the smaller network may cost at most. Each is a number, text such as "4.2G", or a share ("60%")."""

    flops: Annotated[Limit, Option("FLOPs, as fvcore counts them: 4.2e9, 4.2G or 60%", metavar="N")] = None
    params: Annotated[Limit, Option("numbers in its parameters: 10e6, 10M or 60%", metavar="N")] = None
    activations: Annotated[
        Limit, Option("numbers that its convolutions and matrix products write: 5M or 60%", metavar="N")
    ] = None
    peak_activations: Annotated[
        Limit, Option("numbers in activations that are alive at once: 2M or 60%", metavar="N")
    ] = None
    latency: Annotated[
        Limit, Option("time of a forward where it runs now, which is measured: 8ms or 70%", metavar="TIME")
    ] = None

    def given(self) -> dict[str, float | str]:
        """Those that there are."""
        return {name: limit for name, limit in vars(self).items() if limit is not None}


def _declared(kind: type) -> dict[str, tuple[Any, Option]]:
    """Type and option of every field."""
    hints = get_type_hints(kind, include_extras=True)
    return {each.name: get_args(hints[each.name])[:2] for each in fields(kind)}


@dataclass(frozen=True)
class Recovering:
    """Whether and how the smaller network is made accurate again."""

    recover: Annotated[
        bool | Method,
        Option(
            "refit what is left on the data, without labels: least_squares (layer by layer), batch_norm (statistics), "
            "fold (means of what was dropped), distil (layer by layer, then training on the original's outputs), or "
            "auto for the best of the first two on inputs held back",
            metavar="METHOD",
        ),
    ] = False
    samples: Annotated[int, Option("look at no more inputs than these", metavar="N")] = 1024
    memory: Annotated[
        Limit,
        Option(
            "bytes that what forwards hold while they wait for each other may take, such as 2e9 or 2GB; the rest lies "
            "in a temporary file. Left out, half of what is free",
            metavar="N",
        ),
    ] = None


@dataclass(frozen=True)
class Widening:
    """How a wider network is made."""

    factor: Annotated[
        float | None, Option("every layer so many times as wide, from 1 on, such as 1.5", metavar="N")
    ] = None
    init: Annotated[
        Init,
        Option(
            "what is added: new neurons whose weights are drawn, and which nothing reads yet (zero), or copies that "
            "share what read the first of them (copy)"
        ),
    ] = "zero"


def method_of(recover: bool | Method) -> Method | None:
    """The method that is asked for; None for none."""
    if recover is False:
        return None
    return "auto" if recover is True else recover


LARGEST_MULTIPLE = 2**31
"""No layer is as wide."""
DEFAULTS = Settings()
WIDENING = Widening()
RECOVERING = Recovering()
METHODS: tuple[str, ...] = get_args(Method)
"""Ways to recover."""
OPTIONS: dict[str, Option] = {name: option for name, (_, option) in _declared(Settings).items()}
RECOVERING_OPTIONS: dict[str, Option] = {name: option for name, (_, option) in _declared(Recovering).items()}
WIDENING_OPTIONS: dict[str, Option] = {name: option for name, (_, option) in _declared(Widening).items()}
BUDGETS: dict[str, Option] = {name: option for name, (_, option) in _declared(Limits).items()}
CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(kind) for name, (kind, _) in _declared(Settings).items() if get_origin(kind) is Literal
}
"""Of the options that take one of a few words and no others, these words."""
SIZES: tuple[str, ...] = get_args(get_args(Certify)[1])
"""Of the inputs that a certificate compares outputs on."""
KNOWN_POLICIES: tuple[str, ...] = get_args(Policy)
"""The policies that come with this package; callers may register more."""

"""How neurons are chosen: every option once, with its values, default and meaning.

The keyword arguments of `allocator.allocate`, the flags of the command line, the keys of a recipe's YAML and the table
in the documentation are all made from this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from allocator.errors import UnknownNameError

Policy = Literal["per_block", "global", "uniform"]
Scope = Literal["auto", "branches", "inner", "all"]
Groups = Literal["whole", "width"]
Norms = Literal["exact", "loose"]
Weights = Literal["keep", "reset"]


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
            "who competes with whom: per_block (the branches of a block), global (all neurons) or uniform (none: every "
            "branch keeps the same share)"
        ),
    ] = "per_block"
    criterion: Annotated[
        Any,
        Option(
            "what ranks neurons, such as bn_scale or magnitude; auto takes bn_scale where it can meet the budget, else "
            "magnitude",
            metavar="NAME",
        ),
    ] = "auto"
    scope: Annotated[
        Scope,
        Option(
            "which neurons may go: branches (those that enter a concatenation or a grouped convolution), inner (all "
            "but residual streams), all, or auto for the narrowest that can meet the budget"
        ),
    ] = "auto"
    fill: Annotated[
        bool, Option("keep plain shares; do not spend the rest of the budget on the next best neurons", flag="no-fill")
    ] = True
    groups: Annotated[
        Groups, Option("in grouped convolutions, drop whole groups (whole) or narrow all of them alike (width)")
    ] = "whole"
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

    def checked(self) -> Settings:
        """These settings, with `exclude` as a tuple.

        Raises:
            UnknownNameError: a value that is none of an option's.
        """
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        exclude = self.exclude
        if isinstance(exclude, (str, type)) or not isinstance(exclude, Sequence):
            exclude = (exclude,)
        return replace(self, exclude=tuple(exclude))


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise UnknownNameError unless an option's value is one of its choices."""
    if value not in choices:
        raise UnknownNameError(f"no {name} {value!r} (there are {', '.join(choices)})")


def _declared() -> dict[str, tuple[Any, Option]]:
    """Type and option of every field."""
    hints = get_type_hints(Settings, include_extras=True)
    return {each.name: get_args(hints[each.name])[:2] for each in fields(Settings)}


DEFAULTS = Settings()
OPTIONS: dict[str, Option] = {name: option for name, (_, option) in _declared().items()}
CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(kind) for name, (kind, _) in _declared().items() if get_origin(kind) is Literal
}
"""Of the options that take one of a few words and no others, these words."""
KNOWN_POLICIES: tuple[str, ...] = get_args(Policy)
"""The policies that come with this package; callers may register more."""

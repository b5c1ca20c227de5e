"""The table of policies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from allocator.arguments import checked
from allocator.errors import PolicyError, UnknownNameError, none_of
from allocator.planning.problem import Problem

Choose = Callable[[Problem], np.ndarray]
"""(neurons,) bool: a choice of neurons that meets the problem's budgets and keeps what is forced."""
POLICIES: dict[str, Choose] = {}


@checked
def policy(name: str) -> Callable[[Choose], Choose]:
    """Register a policy: a function of the problem that gives the neurons to keep.

    Raises:
        PolicyError: the name is taken.
    """

    def register(choose: Choose) -> Choose:
        if name in POLICIES:
            raise PolicyError(f"policy {name} is registered already")
        POLICIES[name] = choose
        return choose

    return register


def find_policy(name: str) -> Choose:
    """The policy of this name.

    Raises:
        UnknownNameError: no such policy.
    """
    if not isinstance(name, str) or name not in POLICIES:
        raise UnknownNameError(none_of("policy", name, ("auto", *POLICIES)))
    return POLICIES[name]

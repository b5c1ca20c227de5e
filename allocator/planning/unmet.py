"""The error for budgets that cannot be met: they, all that stands against them, and what can be met."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allocator.cost.budget import Budget
from allocator.errors import BudgetError
from allocator.graph.channel_graph import ChannelGraph
from allocator.planning.problem import Widths

_MOST_WIDTHS = 6


def unmet(
    graph: ChannelGraph, exceeded: Sequence[Budget], scope: str, widths: Widths, reachable: Sequence[int]
) -> BudgetError:
    """The error for budgets that cannot be met.

    Args:
        graph: the model's neurons.
        exceeded: the budgets; at least one.
        scope: of which neurons may go.
        widths: what else was asked for.
        reachable: per budget, the smallest figure that can be reached.
    """
    asked = " and ".join(budget.metric.show(budget.limit) for budget in exceeded)
    against = [f"scope={scope!r}"]
    if widths.at_least is not None:
        against.append(f"at_least={widths.at_least!r}")
    if widths.multiple > 1:
        against.append(f"multiple={widths.multiple} (layers that may get narrower have {_widths_of(graph)} channels)")
    found = []
    for budget, figure in zip(exceeded, reachable, strict=True):
        metric, whole = budget.metric, budget.metric.whole
        found.append(f"{metric.show(figure)}, {100 * figure / whole:.1f}% of the model's {metric.show(whole)}")
    first = exceeded[0]
    meant = ""
    if 10 <= first.limit <= 100 < first.metric.whole and float(first.limit).is_integer():
        meant = f"; if a share is meant, write '{first.limit:.0f}%'"
    narrower = _NARROWER if graph.options.groups != "width" and has_groups(graph) else ""
    return BudgetError(
        f"{asked} cannot be met with {', '.join(against)}: the smallest that can be reached is {'; '.join(found)}"
        f"{meant}{narrower}",
        asked=exceeded[0].limit,
        reachable=reachable[0],
    )


_NARROWER = (
    "; groups of convolutions go whole here: groups='width' narrows all groups of a layer alike, and may reach less"
)


def has_groups(graph: ChannelGraph) -> bool:
    """Whether a convolution has groups of several inputs each."""
    return any(join.kind == "groups" for flow in graph.flows for join in flow.joins)


def _widths_of(graph: ChannelGraph) -> str:
    """How wide the layers are that hold neurons, in words."""
    numbers = np.unique(graph.branch_of[graph.branch_of >= 0]).tolist()
    *most, last = sorted({len(graph.facts.written[number].label) for number in numbers})
    if len(most) >= _MOST_WIDTHS:
        return f"{most[0]} to {last}"
    return f"{', '.join(map(str, most))} or {last}" if most else str(last)

"""FLOPs as fvcore counts them: one multiply-add is one FLOP.

How each operator counts is declared with it (`allocator.operators`); calls that fvcore does not count have no term.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from allocator.cost.fvcore import fvcore_flops
from allocator.cost.metric import Metric
from allocator.cost.terms import Term
from allocator.errors import TraceError
from allocator.flow.flow import Flow
from allocator.tracing.calls import Op
from allocator.tracing.operators import FUNCTIONS


def flops_terms(flow: Flow) -> list[Term]:
    """All counted calls of a trace in order; a call that fvcore sees whole is counted once, as a whole.

    fvcore counts no call that the outputs do not depend on, as its trace has lost them, but those of whose results
    they take the size: no other trace tells these apart, so that its own count of the network does.
    """
    live = flow.trace.live()
    terms = _terms(flow, live)
    indices = {op.index for op in live}
    unread = [op for op in flow.trace.ops if op.index not in indices and op.declared.flops is not None]
    return _with_sizes_read(flow, terms, unread) if unread else terms


def _terms(flow: Flow, ops: Sequence[Op]) -> list[Term]:
    terms: list[Term] = []
    counted: set[int] = set()
    for op in ops:
        whole = None if op.call is None else FUNCTIONS[op.call.name].flops
        if whole is not None:
            if id(op.call) not in counted:
                counted.add(id(op.call))
                terms += [Term.of(product, op.module, op.index) for product in whole(flow, op.call)]
        elif op.declared.flops is not None and not _overlooked(flow, op):
            terms += [Term.of(product, op.module, op.index) for product in op.declared.flops(flow, op)]
    return terms


def _with_sizes_read(flow: Flow, terms: list[Term], unread: Sequence[Op]) -> list[Term]:
    """The terms, with as many of calls whose numbers nobody reads as meet fvcore's count; or as they are."""
    try:
        found, _ = fvcore_flops(flow.trace.modules[""], flow.trace.inputs, flow.trace.written())
    except TraceError:
        return terms
    sized: set[int] = set()
    more, total = terms, _total(flow, terms)
    for op in reversed(unread):  # from the last one: it hangs on those before it
        if total == found:
            return more
        tried = _terms(flow, flow.trace.live(also=sized.union(op.outputs)))
        if total < _total(flow, tried) <= found:
            more, total = tried, _total(flow, tried)
            sized.update(op.outputs)
    return more if total == found else terms


def _total(flow: Flow, terms: Sequence[Term]) -> int:
    together = np.zeros(flow.slots.total, dtype=np.int64)
    return Metric("flops", "FLOPs", terms, together, 1).whole


def _overlooked(flow: Flow, op: Op) -> bool:
    """fvcore sees an LSTM, GRU or RNN whole, and does not count it; it does count their cells.

    Nor does it know the twins that work in place (`addmm_`).
    """
    return op.name.endswith("_") or isinstance(flow.trace.modules.get(op.module), nn.RNNBase)

"""FLOPs as fvcore counts them: one multiply-add is one FLOP.

How each operator counts is declared with it (`allocator.operators`); calls that fvcore does not count have no term.
"""

from __future__ import annotations

from torch import nn

from allocator.cost.terms import Term
from allocator.flow.flow import Flow
from allocator.tracing.calls import Op
from allocator.tracing.operators import FUNCTIONS


def flops_terms(flow: Flow) -> list[Term]:
    """All counted calls of a trace in order; a call that fvcore sees whole is counted once, as a whole.

    fvcore counts no call that the outputs do not depend on: its trace has lost them.
    """
    terms: list[Term] = []
    counted: set[int] = set()
    for op in flow.trace.live():
        whole = None if op.call is None else FUNCTIONS[op.call.name].flops
        if whole is not None:
            if id(op.call) not in counted:
                counted.add(id(op.call))
                terms += [Term.of(product, op.module, op.index) for product in whole(flow, op.call)]
        elif op.declared.flops is not None and not _overlooked(flow, op):
            terms += [Term.of(product, op.module, op.index) for product in op.declared.flops(flow, op)]
    return terms


def _overlooked(flow: Flow, op: Op) -> bool:
    """fvcore sees an LSTM, GRU or RNN whole, and does not count it; it does count their cells.

    Nor does it know the twins that work in place (`addmm_`).
    """
    return op.name.endswith("_") or isinstance(flow.trace.modules.get(op.module), nn.RNNBase)

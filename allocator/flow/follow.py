"""Running the operator rules over a trace."""

from __future__ import annotations

from allocator.flow.flow import Facts, Flow, Slots
from allocator.flow.rules import find_rule
from allocator.tracing.record import Op, Trace


class RuleError(Exception):
    """A rule met shapes that do not go together: meta tensors let through what a real forward would not.

    Attributes:
        op: the call.
        flow: labels of all that came before it.
    """

    def __init__(self, op: Op, flow: Flow, cause: Exception):
        super().__init__(f"{op}: {cause}")
        self.op, self.flow = op, flow


def run_rules(trace: Trace, slots: Slots, facts: Facts, **options: object) -> Flow:
    """Label every tensor of `trace`, adding to `facts` what must stay or go together.

    Args:
        trace: a recorded forward.
        slots: numbers of the model's parameters and buffers.
        facts: filled in place; pass the same object for several traces of one model.
        options: `groups`, `norms`, `tied_parts` and `heads` of `Flow`.

    Raises:
        RuleError: the shapes of a call do not go together.
    """
    flow = Flow(trace, slots, facts, **options)  # type: ignore[arg-type]
    for op in trace.ops:
        if not flow.active.isdisjoint(op.inputs()):
            flow.active.update(op.outputs)
        known = find_rule(op)
        if known is None:
            flow.refuse(op, "no rule for this operator")
        else:
            try:
                known(flow, op)
            except ValueError as error:
                raise RuleError(op, flow, error) from error
    flow.freeze_computed_weights()
    for index in trace.outputs:
        flow.freeze_output(index)
    return flow

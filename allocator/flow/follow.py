"""Running the operator rules over a trace, and telling which of its calls depend on values."""

from __future__ import annotations

from allocator.errors import AllocatorError, in_words, text_of
from allocator.flow.facts import NO_RULE, Facts
from allocator.flow.flow import Flow
from allocator.flow.labels import Slots
from allocator.flow.options import Options
from allocator.tracing.calls import Op, Trace
from allocator.tracing.value_sized import value_sized


class RuleError(AllocatorError, ValueError):
    """A rule met shapes that do not go together: meta tensors let through what a real forward would not.

    Attributes:
        op: the call.
        flow: labels of all that came before it.
    """

    def __init__(self, op: Op, flow: Flow, cause: Exception):
        super().__init__(f"{op}: {text_of(cause)}")
        self.op, self.flow = op, flow


def run_rules(trace: Trace, slots: Slots, facts: Facts, options: Options | None = None) -> Flow:
    """Label every tensor of `trace`, adding to `facts` what must stay or go together.

    Args:
        trace: a recorded forward.
        slots: numbers of the model's parameters and buffers.
        facts: filled in place; pass the same object for several traces of one model.
        options: how channels are followed.

    Raises:
        RuleError: the shapes of a call do not go together.
    """
    flow = Flow(trace, slots, facts, options or Options())
    unused = _unused(trace)
    for op in trace.ops:
        frozen, even = len(facts.frozen), len(facts.even)
        if not flow.active.isdisjoint(op.inputs()):
            flow.activate(op)
        if op.declared.multiplies or not flow.derived.isdisjoint(op.inputs()):
            flow.derived.update(op.outputs)
        if op.reads and flow.seeded.issuperset(op.reads):
            flow.seeded.update(op.outputs)
        if op.operator.gives_views and flow.picked.issuperset(op.inputs()):
            flow.picked.update(op.outputs)
        rule = op.declared.rule
        if rule is None:
            flow.refuse(op, NO_RULE)
            continue
        try:
            rule(flow, op)
        except ValueError as error:
            raise RuleError(op, flow, error) from error
        except (IndexError, KeyError, TypeError) as error:
            flow.refuse(op, f"the rule of this operator raised {in_words(error)}")
        if op.seeded:
            flow.keep_size(op)
        if op.index in unused:
            del facts.frozen[frozen:], facts.even[even:]
    flow.freeze_computed_weights()
    for index in _unread(trace) if trace.unfinished else trace.outputs:
        flow.freeze_output(index)
    for index in trace.left:
        flow.freeze_output(index, "its numbers are given to what is not torch")
    return flow


def _unused(trace: Trace) -> set[int]:
    """Indices of the calls of one tensor whose results reach no output, such as attention weights that nobody looks at.

    They may come to anything. Calls of several tensors have to run: weights, or numbers of channels, must fit what they
    are used on. Where a forward reads values, these may decide its path: then all calls count.
    """
    if trace.mode != "meta" or trace.unfinished or not trace.outputs:
        return set()
    return {op.index for op in trace.ops if len(op.inputs()) == 1}.difference(op.index for op in trace.live())


def _unread(trace: Trace) -> set[int]:
    """What a forward that raised had made and not read yet: what it would have returned is among it."""
    made = {i for op in trace.ops for i in (op.outputs if op.takes_apart() or op.declared.splits else op.outputs[:1])}
    return made.difference(*(op.reads for op in trace.ops))


def value_dependent(trace: Trace) -> set[int]:
    """Indices of the calls whose shapes, and so whose cost, may depend on values."""
    sources = {op.index for op in value_sized(trace)}
    values: set[int] = set()
    calls: set[int] = set()
    for op in trace.ops if sources else ():
        if op.index in sources or not values.isdisjoint(op.reads):
            calls.add(op.index)
            values.update(op.outputs)
    return calls

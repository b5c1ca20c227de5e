"""All that is particular to an operator, declared once: one file per family.

A declaration says how channels pass (the decorated rule), what fvcore counts, how the call is made on tensors without
values, and what else the rest of the package has to know of it (`allocator.tracing.operators.Declaration`). Importing
this package fills the table.
"""

from allocator.operators import (
    contraction,
    create,
    draws,
    frequencies,
    functions,
    join,
    norm,
    pointwise,
    recurrent,
    reduce,
    select,
    spatial,
    view,
)

__all__ = [
    "contraction",
    "create",
    "draws",
    "frequencies",
    "functions",
    "join",
    "norm",
    "pointwise",
    "recurrent",
    "reduce",
    "select",
    "spatial",
    "view",
]

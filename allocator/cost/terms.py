"""What every cost is made of: products of numbers of channels.

FLOPs, parameters and activations are all sums of such products, so what a choice of neurons costs needs no forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from allocator.flow.flow import Flow
from allocator.flow.labels import Label


class Product(NamedTuple):
    """What one call or tensor costs, before its labels are known to stay.

    Attributes:
        factor: the cost per kept index of every labelled dim; dims without labels are in it.
        labels: one entry per dim, None for a dim that is in the factor.
        printed: the factor counts two per multiply-add, and fvcore reads the product off a printed figure.
        recount: of a call that several products stand for, which fvcore reads as one figure: what they are together, by
            the numbers of kept indices of the labelled dims.
    """

    factor: int
    labels: Sequence[Label]
    printed: bool = False
    recount: Callable[..., int] | None = None


@dataclass(frozen=True)
class Term:
    """One product of a metric.

    Attributes:
        factor: the cost per kept index of every axis; a whole number where it is counted, not measured.
        axes: label arrays; the cost is the factor times the number of kept labels of each.
        module: path of the module that was running, or that holds the tensor.
        op: index into the trace's ops; -1 where no call is meant.
        printed, recount: as for `Product`.
    """

    factor: float
    axes: tuple[np.ndarray, ...]
    module: str = ""
    op: int = -1
    printed: bool = False
    recount: Callable[..., int] | None = None

    @classmethod
    def of(cls, product: Product, module: str = "", op: int = -1) -> Term:
        """The term of a product."""
        axes = tuple([label for label in product.labels if label is not None])
        return cls(product.factor, axes, module, op, product.printed, product.recount)


def elements(flow: Flow, value: int, scale: int = 1, dims: slice = slice(None)) -> Product:
    """`scale` per element of a value, over some of its dims."""
    shape, labels = flow.shape(value)[dims], flow.labels(value)[dims]
    plain = math.prod([n for n, label in zip(shape, labels, strict=True) if label is None])
    return Product(scale * plain, labels)


def times(a: Product, b: Product) -> Product:
    """The product of two."""
    return Product(a.factor * b.factor, [*a.labels, *b.labels])

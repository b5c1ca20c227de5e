"""Rows of the rule table: recurrent layers that run as one call, and packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from oracle import Data, single
from rule_rows import aten, case

_GATES = {"ih": (16, 6), "hh": (16, 4), "b": (16,), "b2": (16,)}
_STATE = Data((2, 4), (1,), single)


def _lstm(m: Any, x: torch.Tensor, state: torch.Tensor, cell: torch.Tensor) -> Any:
    rows = (4 * m.units,)
    sizes = (m.ih.shape, (*rows, x.shape[-1])), (m.hh.shape, (*rows, m.units)), (m.b.shape, rows), (m.b2.shape, rows)
    if any(found != fits for found, fits in sizes) or {state.shape, cell.shape} != {(len(state), m.units)}:
        raise ValueError("the operator itself reads beyond its tensors then")
    return aten.mkldnn_rnn_layer(
        x, m.ih, m.hh, m.b, m.b2, state, cell, False, [], 2, m.units, 1, True, False, False, False
    )[:3]


def _lengths(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([3, 2])


RECURRENT = {
    "mkldnn_rnn_layer": [
        case(
            _lstm,
            Data((3, 2, 6), (2,), single),
            _STATE,
            _STATE,
            weights=_GATES,
            make=single,
            counts={"units": (1, 1, 0, 4)},
            attributes={"units": 4},
            contracts=True,
            mode="real",
            tolerance=1e-5,
        )
    ],
    "_pack_padded_sequence": [
        case(
            lambda m, x, n, first=first: aten._pack_padded_sequence(x, n, first)[0],
            Data((2, 3, 6) if first else (3, 2, 6), (2,)),
            Data((2,), (), _lengths),
            mode="real",
        )
        for first in (True, False)
    ],
}

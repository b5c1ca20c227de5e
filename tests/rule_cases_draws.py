"""Rows of the table of operator rules: random numbers, all but sure ones, and Fourier transforms."""

from __future__ import annotations

import torch
from oracle import Data, positive
from rule_rows import FEATURES, IMAGE, aten, each

_SHARES = Data((2, 4, 6), (1, 2), positive)
_PARTS = Data((2, 6, 4, 2), (1,))


FREQUENCIES = {
    "_fft_r2c": [
        *each(lambda x: torch.fft.rfft2(x), IMAGE),
        *each(lambda x: torch.fft.rfft(x, dim=1), FEATURES),
    ],
    "_fft_c2r": [
        *each(lambda x: torch.fft.irfft2(torch.complex(x, x.exp())), IMAGE),
        *each(lambda x: torch.fft.irfft(torch.complex(x, x.exp()), dim=1), FEATURES),
    ],
    "_fft_c2c": each(lambda x: torch.fft.fft(torch.complex(x, x.exp()), dim=-1), IMAGE),
    "view_as_complex": [
        *each(torch.view_as_complex, _PARTS),
        *each(torch.view_as_complex, Data((3, 6, 2), (1, 2))),
    ],
    "view_as_real": each(lambda x: torch.view_as_real(torch.complex(x, x.exp())), IMAGE),
    "complex": each(torch.complex, IMAGE, IMAGE),
    "polar": each(lambda x, y: torch.polar(x.abs(), y), IMAGE, IMAGE),
}


DRAWS = {
    "normal": [
        *each(lambda x: x.normal_(3.0, 0.0), IMAGE),
        *each(lambda x: torch.normal(x, 0.0), IMAGE),
        *each(lambda x: x + torch.normal(1.0, 0.0, x.shape, dtype=x.dtype, device=x.device), IMAGE),
    ],
    "normal_functional": each(lambda x: aten.normal_functional(x, 1.0, 0.0), IMAGE),
    "uniform": each(lambda x: x.uniform_(0.5, 0.5), IMAGE),
    "random": each(lambda x: x.random_(3, 4), IMAGE),
    "exponential": each(lambda x: x.exponential_(1e9).round(), IMAGE),
    "geometric": each(lambda x: x.geometric_(1 - 1e-12), IMAGE),
    "cauchy": each(lambda x: x.cauchy_(1.0, 1e-15), IMAGE, tolerance=1e-3),
    "log_normal": each(lambda x: x.log_normal_(1.0, 1e-300), IMAGE),
    "poisson": each(lambda x: torch.poisson(x * 0), IMAGE),
    "binomial": each(lambda x: torch.binomial(x.sign().relu(), torch.ones_like(x)), IMAGE),
    "_standard_gamma": each(lambda x: torch._standard_gamma(x.abs() + 1) * 0, IMAGE),
    "_sample_dirichlet": each(lambda x: torch._sample_dirichlet(x * 1e12).round(decimals=3), _SHARES),
    "multinomial": each(lambda x: torch.multinomial(x, 1), Data((3, 6), (0, 1), lambda s: torch.eye(*s))),
    "bernoulli": [
        *each(lambda x: torch.bernoulli(x.gt(0).to(x.dtype)), IMAGE),
        *each(lambda x: x * torch.empty_like(x).bernoulli_(1.0), IMAGE),
        *each(lambda x: x * x.new_empty(x.shape).bernoulli_(1.0), IMAGE),
    ],
}

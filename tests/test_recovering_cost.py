"""What a refit costs: memory beside what the forwards hold, and no matrix of unknowns where rows are few."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import allocator
from allocator.recovering.ridge import refit
from allocator.recovering.targets import Part


def most_alive(profiled: Any) -> int:
    """Bytes that were allocated and not yet freed at one time while the profiler looked, in all threads."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_a_refit_takes_two_models_and_one_matrix() -> None:
    width, rows = 512, 800
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(width, 10)).eval()
    data = torch.randn(rows, width)
    result = allocator.allocate(model, "80%", example_inputs=data[:1], certify=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        recovery = allocator.recover(result, data, "least_squares").recovery
    assert recovery is not None
    assert all(layer.rows > width and not layer.note for layer in recovery.layers)
    assert any(layer.step for layer in recovery.layers)
    models = 2 * sum(4 * parameter.numel() for parameter in model.parameters())
    matrix = 8 * width**2
    forwards = 2 * 3 * 4 * rows * width  # both networks hold what a layer reads, what that was made of, what it gives
    assert most_alive(profiled) < models + matrix + forwards


@pytest.mark.parametrize("cuts_off", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_few_rows_are_fitted_along_themselves_alone(offset: bool, cuts_off: bool) -> None:
    """With fewer rows than unknowns no matrix of unknowns by unknowns is made, and as good a fit is found."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 60, 90, generator=generator, dtype=torch.float64)
    y = x[:, :, :4] + x[:, :, 4:8]
    ends = (torch.full((1, 1, 1), -0.5).double(), torch.full((1, 1, 1), 3.0).double()) if cuts_off else None
    parts = {False: [Part(x[:, :40], y[:, :40], ends)], True: [Part(x[:, 40:], y[:, 40:], ends)]}
    start = 0.1 * torch.randn(2, 4, 91, generator=generator, dtype=torch.float64)
    found, widest = {}, {}
    for few in (True, False):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            found[few] = refit(parts.__getitem__, start, offset=offset, few=few)
        shapes = [shape for event in profiled.events() for shape in event.input_shapes if len(shape) > 1]
        widest[few] = max(min(shape[-2:]) for shape in shapes)
    assert widest == {True: 40, False: 90}
    assert found[True].after < 0.9 * found[True].before
    assert found[True].after < 1.02 * found[False].after

"""Outputs are compared on the smallest inputs that a model takes in the same steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import allocator
from allocator.verifying import smaller

IMAGE = torch.zeros(1, 3, 256, 384)


@pytest.fixture(autouse=True)
def _worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smaller, "WORTH", 0)


class Narrowing(nn.Module):
    """Convolutions that halve an image, and a head on the mean of what is left."""

    def __init__(self, halvings: int = 2, channels: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for _ in range(halvings):
            layers += [nn.Conv2d(width, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU()]
            width = channels
        self.body, self.head = nn.Sequential(*layers), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).mean((2, 3)))
        return y


class Flattened(Narrowing):
    """A head that takes one size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8 * 64 * 96, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).flatten(1))
        return y


class Branching(Narrowing):
    """Another path for small images."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return F.softmax(y.mean((2, 3)), 1) if x.shape[-1] < 200 else super().forward(x)


class Sampled(nn.Module):
    """Rows of the image are the channels of a linear layer: no side without channels but the height."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(384, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.relu(self.up(x)))
        return y


class Picking(Narrowing):
    """Which channels are read hangs on the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).mean((2, 3)).narrow(1, x.shape[-2] // 64, 4))
        return y


class Pointing(Narrowing):
    """Pixels by number, some of which a smaller image does not have: sizes alone don't tell."""

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.body(x).flatten(2)
        y: Tensor = self.head(pixels[:, :, torch.tensor([0, 5000], device=x.device)].mean(2))
        return y


class Swapping(Narrowing):
    """The same calls, returned in an order that hangs on the size of the image."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        means, largest = y.mean((2, 3)), y.amax((2, 3))
        both = self.head(means), self.head(largest)
        return both if x.shape[-1] > 200 else both[::-1]  # type: ignore[return-value]


def shapes(model: nn.Module, image: Tensor = IMAGE) -> tuple[int, ...] | None:
    found = smaller.smaller_inputs(allocator.trace(model, image))
    return None if found is None else tuple(found.tensors()[0].shape)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Narrowing(), (1, 3, 64, 96)),
        (Narrowing(5), (1, 3, 64, 96)),
        (Narrowing(6), (1, 3, 96, 160)),  # of 64 pixels one would be left, and of its kernels' weights the middle one
        (Narrowing(1, 300), (1, 3, 64, 96)),
        (Flattened(), None),
        (Branching(), None),
        (Sampled(), None),
        (Picking(), None),
        (Swapping(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_as_small_as_the_same_steps_allow(model: nn.Module, expected: tuple[int, ...] | None) -> None:
    assert shapes(model) == expected


def test_short_sides_stay() -> None:
    assert shapes(Narrowing(), torch.zeros(1, 3, 96, 384)) is None
    assert shapes(Narrowing(), torch.zeros(1, 3, 127, 384)) is None
    assert shapes(Narrowing(), torch.zeros(1, 3, 128, 192)) == (1, 3, 64, 96), "half the sides is small enough"


def test_short_forwards_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smaller, "WORTH", 10**9)
    assert shapes(Narrowing()) is None


@pytest.mark.parametrize("certify", ["small", True])
def test_the_certificate_says_on_which(certify: bool | str) -> None:
    torch.manual_seed(0)
    made = allocator.allocate(Narrowing(), "60%", example_inputs=IMAGE, certify=certify).certificate  # type: ignore[arg-type]
    assert made.ok
    assert (made.input_shapes, made.compared_shapes) == (((1, 3, 256, 384),), ((1, 3, 64, 96),))
    assert "float64 outputs within" in str(made)
    assert " at 1x3x64x96" in str(made)


def test_at_full_size() -> None:
    torch.manual_seed(0)
    model = Narrowing()
    result = allocator.allocate(model, "60%", example_inputs=IMAGE, certify="full")
    assert result.certificate.compared_shapes == result.certificate.input_shapes
    assert " at " not in str(result.certificate)
    again = allocator.verify(model, result.model, result.allocation, numeric="full")
    assert again == result.certificate


def test_where_the_original_does_not_run_at_the_small_size_the_full_one_counts() -> None:
    torch.manual_seed(0)
    model = Pointing()
    assert shapes(model) == (1, 3, 64, 96)
    made = allocator.allocate(model, "60%", example_inputs=IMAGE).certificate
    assert made.ok
    assert made.compared_shapes == made.input_shapes


def test_nothing_is_compared() -> None:
    assert allocator.allocate(Narrowing(), "60%", example_inputs=IMAGE, certify=False).certificate.compared_shapes == ()


def test_a_mistake_is_seen_at_the_small_size() -> None:
    torch.manual_seed(0)
    model = Narrowing()
    result = allocator.allocate(model, "60%", example_inputs=IMAGE)
    result.model.get_buffer("body.1.running_mean")[0] += 1
    found = allocator.verify(model, result.model, result.allocation)
    assert found.relative_error is not None
    assert found.compared_shapes != found.input_shapes
    assert not found.ok
    assert found.relative_error > 1e-3


@pytest.mark.parametrize("value", ["medium", 3, None])
def test_other_words(value: object) -> None:
    with pytest.raises(allocator.InputError, match=r"certify=.* is none of 'small', 'full', True or False"):
        allocator.allocate(Narrowing(), "60%", example_inputs=IMAGE, certify=value)  # type: ignore[arg-type]

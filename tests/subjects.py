"""A small network with branches, and a check that a model was left exactly as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

IMAGE = torch.zeros(1, 3, 16, 16)


class Branches(nn.Module):
    """A stem of 16 channels, then branches of 16 (1x1) and 32 (3x3) that are concatenated, then a classifier."""

    def __init__(self, *, norm: bool = True) -> None:
        super().__init__()

        def make(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels) if norm else nn.Identity()

        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), make(16)
        self.narrow, self.narrow_norm = nn.Conv2d(16, 16, 1), make(16)
        self.wide, self.wide_norm = nn.Conv2d(16, 32, 3, padding=1), make(32)
        self.head = nn.Linear(48, 10)

    def features(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, 48, h, w)."""
        x = F.relu(self.norm(self.stem(x)))
        narrow = F.relu(self.narrow_norm(self.narrow(x)))
        wide = F.relu(self.wide_norm(self.wide(x)))
        return torch.cat([narrow, wide], 1)

    def forward(self, x: Tensor) -> Any:
        """(n, 3, h, w) to (n, 10)."""
        return self.head(self.features(x).mean((2, 3)))


class Parts(nn.Module):
    """A stem of 12 channels in two parts of `width`, a layer of 5 on each, then a classifier.

    The forward divides by the width, which so cannot become one number per part: a repair makes the parts equal.
    """

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.left, self.right = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, 4)."""
        x = F.relu(self.norm(self.first(x)))
        assert x.shape[1] // self.width == 2
        left, right = x.split(self.width, 1)
        return self.head(torch.cat([self.left(left), self.right(right)], 1).mean((2, 3)))


class Nested(nn.Module):
    """A stream that is added to, an inner layer, and two branches of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.inner, self.inner_norm = nn.Conv2d(12, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.left, self.left_norm = nn.Conv2d(10, 6, 1), nn.BatchNorm2d(6)
        self.right, self.right_norm = nn.Conv2d(10, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.back, self.back_norm = nn.Conv2d(14, 12, 1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        y = self.inner_norm(self.inner(x)).relu()
        y = torch.cat([self.left_norm(self.left(y)), self.right_norm(self.right(y))], 1).relu()
        return self.head((x + self.back_norm(self.back(y))).relu().mean((2, 3)))


def vision_transformer(depth: int) -> Any:
    """timm's, of 32 channels, 4 heads and images of 16x16, in eval mode; skips where timm is not installed."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    kind = timm.models.vision_transformer.VisionTransformer
    return kind(img_size=16, patch_size=8, embed_dim=32, depth=depth, num_heads=4, num_classes=6).eval()


def randomised_norms(model: nn.Module, seed: int = 0) -> Any:
    """Give every batch norm scales, shifts and statistics away from their start; set eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.2, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.3, generator=generator)
            nn.init.normal_(module.running_mean, std=0.3, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 2.0, generator=generator)
    return model.eval()


def trained(model: nn.Module | None = None) -> Any:
    """`Branches`, or the given network, as after training."""
    return randomised_norms(Branches() if model is None else model)


@contextlib.contextmanager
def untouched(model: object) -> Iterator[None]:
    """Assert that a model is bit for bit the same afterwards: tensors, flags, attributes, hooks, structure."""
    before, grad, dtype = snapshot(model), torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    after = snapshot(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key] == value, f"{key} changed"
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == (grad, dtype)


def snapshot(model: object) -> dict[str, Any]:
    """Everything a module and its children hold, comparable, by path and attribute name."""
    if not isinstance(model, nn.Module):
        return {"": _plain(model)}
    held: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        held[f"{path}:class"] = type(module)
        for key, value in vars(module).items():
            held[f"{path}:{key}"] = _plain(value)
    return held


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return ("module", id(value))
    if isinstance(value, Tensor):
        return _bits(value)
    if isinstance(value, dict):
        return [(key, _plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return (type(value), [_plain(item) for item in value])
    if isinstance(value, (int, float, str, bool, type(None))):
        return repr(value)
    return (type(value), id(value))


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    flags = (id(tensor), tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_leaf, tensor._version)
    if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)) or tensor.is_meta:
        return flags
    if tensor.layout is not torch.strided:
        return (*flags, tensor.layout, tensor.detach().to_dense().numpy().tobytes())
    shape = (tuple(tensor.shape), tensor.stride(), tensor.data_ptr())
    plain = tensor.int_repr() if tensor.is_quantized else tensor.detach()
    grad = None if not tensor.is_leaf or tensor.grad is None else _bits(tensor.grad)
    return (*flags, *shape, bytes(plain.reshape(-1).contiguous().view(torch.uint8).numpy()), grad)

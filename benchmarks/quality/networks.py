"""Small networks of the families that people use, for 32x32 images of one channel and ten classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import allocator

SIDE = 32
CLASSES = 10


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU."""
    padding = kernel // 2
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(inputs, width), conv(width, width, 3, stride))
        self.last = nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.body(x)) + self.shortcut(x))


class Inception(nn.Module):
    """Four branches of different kernels, concatenated (Szegedy et al., CVPR 2015)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.one = conv(inputs, width)
        self.three = nn.Sequential(conv(inputs, width), conv(width, width, 3))
        self.five = nn.Sequential(conv(inputs, width // 2), conv(width // 2, width // 2, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(inputs, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class Inverted(nn.Module):
    """Expansion, depthwise, projection, with a shortcut where shapes allow (Sandler et al., CVPR 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.body = nn.Sequential(conv(inputs, hidden), conv(hidden, hidden, 3, stride, groups=hidden))
        self.last = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.body(x))
        return x + y if self.shortcut else y


class DenseLayer(nn.Module):
    """What a layer makes of all before it is put beside them (Huang et al., CVPR 2017)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.narrow = nn.BatchNorm2d(inputs), conv(inputs, 2 * growth)
        self.wide = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.wide(self.narrow(F.relu(self.norm(x))))], 1)


def _head(inputs: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES)]


def residual() -> nn.Module:
    """Six bottlenecks in three stages."""
    stages = [
        Bottleneck(16, 16, 48, 1),
        Bottleneck(48, 16, 48, 1),
        Bottleneck(48, 24, 96, 2),
        Bottleneck(96, 24, 96, 1),
    ]
    stages += [Bottleneck(96, 32, 128, 2), Bottleneck(128, 32, 128, 1)]
    return nn.Sequential(conv(1, 16, 3, 2), *stages, *_head(128))


def inception() -> nn.Module:
    """Four blocks of four branches in two stages."""
    return nn.Sequential(
        conv(1, 16, 3, 2), Inception(16, 16), Inception(48, 16), nn.MaxPool2d(2), Inception(48, 32), Inception(96, 32),
        *_head(96),
    )  # fmt: skip


def inverted() -> nn.Module:
    """Six inverted residuals in three stages."""
    blocks = [Inverted(16, 16, 1), Inverted(16, 24, 2), Inverted(24, 24, 1), Inverted(24, 40, 2), Inverted(40, 40, 1)]
    return nn.Sequential(conv(1, 16, 3, 2), *blocks, conv(40, 128), *_head(128))


def dense() -> nn.Module:
    """Two dense blocks of five layers with a transition between them."""
    layers: list[nn.Module] = [conv(1, 24, 3, 2)]
    width, growth = 24, 12
    for last in (False, True):
        for _ in range(5):
            layers.append(DenseLayer(width, growth))
            width += growth
        if not last:
            layers += [conv(width, width // 2), nn.AvgPool2d(2)]
            width //= 2
    return nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU(), *_head(width))


def scalenet() -> nn.Module:
    """ScaleNet's seed: four scales, more neurons than it needs (Li et al., CVPR 2019)."""
    model: nn.Module = allocator.build("recipe:scalenet-small-seed", image_side=SIDE)
    return model


class Attention(nn.Module):
    """Self-attention, `causal` where no token may see a later one, and an MLP, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, hidden: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.head_dim, self.causal = heads, width // heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(b, n, -1)
        x = x + self.proj(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Four layers (Dosovitskiy et al., ICLR 2021) behind convolutions (Xiao et al., NeurIPS 2021).

    From patches of 4x4 pixels it learns next to nothing of so few images.
    """

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv(1, 24, 3, 2), conv(24, 32, 3), conv(32, width, 3, 2), conv(width, width, 3), nn.Conv2d(width, width, 1)
        )
        self.positions = nn.Parameter(0.02 * torch.randn(1, (SIDE // 4) ** 2, width))
        self.layers = nn.Sequential(*(Attention(width, 4, 3 * width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(x)).mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": residual,
    "inception": inception,
    "inverted": inverted,
    "dense": dense,
    "scalenet": scalenet,
    "vit": VisionTransformer,
}

"""The paper's two networks as for 32 x 32 images, a smaller ResNet, and one that two CPU cores train in minutes.

ResNet (He et al., 2016) and DenseNet-BC (Huang et al., 2017) with a 3 x 3 stem of stride 1 and no pooling before the last.
``width`` scales all channels; at 1, with ten classes, ResNet-34 has 21,282,122 parameters, DenseNet-121 6,956,298.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

TITLES = {
    "small": "small convolutional network",
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "densenet121": "DenseNet-121",
}


def make(key: str, channels: int, classes: int, width: float = 1.0) -> nn.Module:
    """A network for images (n, channels, height, width), giving logits (n, classes); ``key`` is one of TITLES."""
    if key not in TITLES:
        raise ValueError(f"there is no network {key!r} (allowed: {', '.join(TITLES)})")
    if not 0 < width <= 4:
        raise ValueError(f"the width is {width} (allowed: above 0, at most 4; 1 is the paper's network)")

    def wide(n: int) -> int:
        return max(1, round(n * width))

    if key == "small":
        return SmallNetwork(channels, classes, wide)
    if key == "densenet121":
        return DenseNet(channels, classes, wide(32), (6, 12, 24, 16))
    return ResNet(channels, classes, wide, (2, 2, 2, 2) if key == "resnet18" else (3, 4, 6, 3))


def convolution(inside: int, outside: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, size, stride, padding=size // 2, bias=False)


class SmallNetwork(nn.Module):
    """Three convolutions, each halving the image."""

    def __init__(self, channels: int, classes: int, wide: Callable[[int], int]) -> None:
        super().__init__()
        widths = [channels, wide(32), wide(64), wide(128)]
        self.convolutions = nn.ModuleList(convolution(a, b, 3, 2) for a, b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convolutions, self.norms, strict=True):
            x = relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = convolution(inside, outside, 3, stride), nn.BatchNorm2d(outside)
        self.conv2, self.norm2 = convolution(outside, outside, 3), nn.BatchNorm2d(outside)
        same = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if same else nn.Sequential(convolution(inside, outside, 1, stride), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.norm2(self.conv2(relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, channels: int, classes: int, wide: Callable[[int], int], blocks: tuple[int, ...]) -> None:
        super().__init__()
        inside = wide(64)
        self.stem, self.norm = convolution(channels, inside, 3), nn.BatchNorm2d(inside)
        layers = []
        for stage, count in enumerate(blocks):
            outside = wide(64 << stage)
            for block in range(count):
                layers.append(ResidualBlock(inside, outside, 2 if stage and block == 0 else 1))
                inside = outside
        self.blocks, self.head = nn.Sequential(*layers), nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(relu(self.norm(self.stem(x)))).mean((2, 3)))


class DenseLayer(nn.Module):
    """A bottleneck of 4 x growth channels; what it adds stands before what it was given."""

    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inside), convolution(inside, 4 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), convolution(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv2(relu(self.norm2(self.conv1(relu(self.norm1(x)))))), x], 1)


class Transition(nn.Module):
    """Half the channels, half the image."""

    def __init__(self, inside: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inside), convolution(inside, inside // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(self.conv(relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    def __init__(self, channels: int, classes: int, growth: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        inside = 2 * growth
        self.stem = convolution(channels, inside, 3)
        layers: list[nn.Module] = []
        for stage, count in enumerate(blocks):
            if stage:
                layers.append(Transition(inside))
                inside //= 2
            for _ in range(count):
                layers.append(DenseLayer(inside, growth))
                inside += growth
        self.layers, self.norm, self.head = nn.Sequential(*layers), nn.BatchNorm2d(inside), nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(relu(self.norm(self.layers(self.stem(x)))).mean((2, 3)))

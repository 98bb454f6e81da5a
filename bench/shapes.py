"""The parameter lists that are stepped over: shapes of real networks and plain lists, and random numbers to fill them."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

Shape = tuple[int, ...]


def resnet34() -> list[Shape]:
    """ResNet-34 for CIFAR: a 3x3 stem, ten classes."""
    shapes = [(64, 3, 3, 3), (64,), (64,)]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for _ in range(blocks):
            shapes += [(width, inside, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if inside != width:
                shapes += [(width, inside, 1, 1), (width,), (width,)]
            inside = width
    return [*shapes, (10, inside), (10,)]


def densenet121() -> list[Shape]:
    """DenseNet-121 for CIFAR: growth 32, bottlenecks of 128, ten classes."""
    shapes, channels = [(64, 3, 3, 3)], 64
    for blocks in (6, 12, 24, 16):
        for _ in range(blocks):
            shapes += [(channels,), (channels,), (128, channels, 1, 1), (128,), (128,), (32, 128, 3, 3)]
            channels += 32
        if blocks != 16:  # a transition halves the channels
            shapes += [(channels,), (channels,), (channels // 2, channels, 1, 1)]
            channels //= 2
    return [*shapes, (channels,), (channels,), (10, channels), (10,)]


def gpt2() -> list[Shape]:
    """GPT-2 with 124 M parameters; the head shares the embedding."""
    d = 768
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *12 * block, (d,), (d,)]


def llama_1b() -> list[Shape]:
    """A Llama of 1.2 B parameters: 16 layers, grouped queries; the head shares the embedding."""
    d, kv, hidden = 2048, 512, 8192
    block = [(d, d), (kv, d), (kv, d), (d, d), (hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
    return [(128256, d), *16 * block, (d,)]


NETWORKS = {
    "resnet34": ("ResNet-34 (CIFAR)", resnet34),
    "densenet121": ("DenseNet-121 (CIFAR)", densenet121),
    "gpt2": ("GPT-2, 124 M", gpt2),
    "llama1b": ("Llama, 1.2 B", llama_1b),
}
LISTS = ["24x1M", "1000x16", "10000x16"]
CLIPPED, SCALED = "clipped", "scaled"
QUICK = ["1x4M", "resnet34", "1000x16"]


def default_cases(device: str) -> list[str]:
    if device == "cpu":
        return ["1x32M", "1x32M:clipped", "1x4M", *NETWORKS, *LISTS]
    return ["1x256M", "1x256M:clipped", *NETWORKS, *LISTS, "1x256M:bfloat16", "gpt2:bfloat16", "llama1b:bfloat16"]


class Loop(NamedTuple):
    """What a training loop does besides: the gradients' norm is clipped before each step; a torch.amp.GradScaler takes it."""

    clipped: bool = False
    scaled: bool = False


PLAIN = Loop()


def case_of(name: str) -> tuple[str, list[Shape], torch.dtype, Loop]:
    """Title, shapes and dtype of a case, and what the loop does: a network's name, or "24x1M" for 24 tensors of a million;
    ":bfloat16", ":clipped" and ":scaled" may follow."""
    body, *words = name.split(":")
    loop = Loop(CLIPPED in words, SCALED in words)
    dtype_name = "".join(word for word in words if word not in (CLIPPED, SCALED))
    dtype = getattr(torch, dtype_name or "float32", None)
    if body in NETWORKS:
        title, shapes = NETWORKS[body][0], NETWORKS[body][1]()
    else:
        match = re.fullmatch(r"(\d+)x(\d+)([KMG]?)", body)
        shapes = [(int(match[2]) * 1000 ** " KMG".index(match[3] or " "),)] * int(match[1]) if match else []
        tensors = "one tensor" if len(shapes) == 1 else f"{len(shapes):,} tensors"
        title = f"{tensors} of {short(shapes[0][0])}" if shapes else ""
    if not shapes or dtype not in (torch.float64, torch.float32, torch.bfloat16):
        raise ValueError(
            f"no case {name!r} (allowed: {', '.join(NETWORKS)}, or 24x1M and the like; then :bfloat16, say, :clipped or :scaled)"
        )
    title += f", {dtype_name}" * bool(dtype_name) + ", gradients clipped" * loop.clipped + ", under a GradScaler" * loop.scaled
    return title, shapes, dtype, loop


def short(n: int) -> str:
    """4000000 as "4 M"; as it is where that would not be exact."""
    unit = max(k for k in range(4) if n % 1000**k == 0)
    return f"{n // 1000**unit:,} {' KMG'[unit]}".rstrip()


def count(shapes: list[Shape]) -> int:
    return sum(map(math.prod, shapes))


def bounded(shapes: list[Shape], tensor: int = 1 << 22, total: int = 1 << 25) -> list[Shape]:
    """The shapes with tensors cut to 4 M elements, the first of them that hold 32 M: what is verified of huge cases."""
    kept: list[Shape] = []
    for shape in shapes:
        kept.append(shape if math.prod(shape) <= tensor else (tensor,))
        if count(kept) >= total:
            break
    return kept


def random_tensors(shapes: list[Shape], device: str, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Normal numbers: the time of an operation may depend on its values, and untouched zeros lie in no memory at all."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(s, generator=generator, device=device, dtype=dtype).mul_(scale) for s in shapes]


def random_parameters(shapes: list[Shape], device: str, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters with gradients of about 1e-2."""
    weights, grads = (random_tensors(shapes, device, dtype, scale, seed) for seed, scale in enumerate((1.0, 1e-2)))
    return with_gradients(weights, grads)


def copies(params: list[Parameter]) -> list[Parameter]:
    """The same weights and gradients in memory of their own."""
    return with_gradients([p.detach().clone() for p in params], [p.grad.clone() for p in params])


def with_gradients(weights: list[Tensor], grads: list[Tensor]) -> list[Parameter]:
    params = [Parameter(w) for w in weights]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    return params

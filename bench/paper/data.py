"""The images: digits from scikit-learn, Fashion-MNIST as IDX files, CIFAR-10 and CIFAR-100 as the binary files of their site.

All are read into uint8 tensors and augmented where they lie, on the device. Nothing that is read is executed.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

NAMES = {"digits": "digits", "fashion": "Fashion-MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # its package dataset-fashion-mnist
WHERE = {
    "digits": "comes with scikit-learn; give no folder",
    "fashion": f"four files *-ubyte or *-ubyte.gz; Debian's package dataset-fashion-mnist puts them into {DEBIAN}",
    "cifar10": "data_batch_1.bin to data_batch_5.bin and test_batch.bin, of cifar-10-binary.tar.gz",
    "cifar100": "train.bin and test.bin, of cifar-100-binary.tar.gz",
}


class WrongData(Exception):
    """What is wrong with the files, and which they should be."""


class Data(NamedTuple):
    """Images, uint8 (n, channels, height, width), labels, int64 (n,), and how they are normalised and augmented."""

    key: str
    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    mean: tuple[float, ...]  # of each channel, in [0, 1]
    std: tuple[float, ...]
    pad: int  # a crop's largest shift, in pixels
    flip: bool

    @property
    def channels(self) -> int:
        return self.train_x.shape[1]

    @property
    def augmentation(self) -> str:
        return f"pad {self.pad}, crop" + (", flip" if self.flip else "")

    def to(self, device: torch.device) -> Data:
        return self._replace(**{name: getattr(self, name).to(device) for name in ("train_x", "train_y", "test_x", "test_y")})

    def normalized(self, images: Tensor) -> Tensor:
        """uint8 images as float32 in the layout they have, less ``mean``, over ``std``."""
        return (images / 255 - by_channel(self.mean, images.device)) / by_channel(self.std, images.device)


@functools.cache  # made anew each time, they could not be used in a CUDA graph
def by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(-1, 1, 1)


class Augmented:
    """A data set's training images, padded with black once, of which each epoch takes other crops and flips."""

    def __init__(self, data: Data) -> None:
        self.data, self.height, self.width = data, *data.train_x.shape[2:]
        self.padded = pad(data.train_x, [data.pad] * 4)

    def epoch(self, seed: int, epoch: int) -> Tensor:
        """What the epoch shows, a row for each image in its order: (index, top, left, flipped), int64 (n, 4)."""
        digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        n, shifts = len(self.padded), 2 * self.data.pad + 1
        columns = [torch.randperm(n, generator=generator)]
        columns += [torch.randint(k, (n,), generator=generator) for k in (shifts, shifts, 2 if self.data.flip else 1)]
        return torch.stack(columns, 1).to(self.padded.device)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images, float32 (b, channels, height, width) in memory as channels_last, and labels of some rows of an epoch."""
        index, top, left, flipped = rows.unsqueeze(-1).unbind(1)  # each (b, 1)
        y, x = (torch.arange(n, device=rows.device) for n in (self.height, self.width))
        columns = left + torch.where(flipped.bool(), self.width - 1 - x, x)
        images = self.padded[
            index.unsqueeze(-1), :, (top + y).unsqueeze(-1), columns.unsqueeze(1)
        ]  # (b, height, width, channels)
        return self.data.normalized(images.permute(0, 3, 1, 2)), self.data.train_y[index.squeeze(1)]


def load(key: str, folder: Path | None = None, name: str | None = None) -> Data:
    """One of NAMES from its files; ``name`` says what is in them where they are no originals.

    Raises: WrongData where files are missing, cut short, of another kind, or hold labels there should not be.
    """
    if key not in NAMES:
        raise ValueError(f"there are no data {key!r} (allowed: {', '.join(NAMES)})")
    if key == "digits":
        return _digits(name or NAMES[key])
    if key == "fashion":
        folder = folder or DEBIAN
    if folder is None or not folder.is_dir():
        missing = "no folder is given" if folder is None else f"{folder} is no folder"
        raise WrongData(f"{NAMES[key]}: {missing}: name the one that holds {WHERE[key]}")
    images, mean, std = _READERS[key](folder)
    for part, labels in zip(("training", "test"), images[1::2], strict=True):
        _check_labels(folder, part, labels, 100 if key == "cifar100" else 10)
    tensors = [torch.from_numpy(np.array(a, dtype)) for a, dtype in zip(images, 2 * (np.uint8, np.int64), strict=True)]
    return Data(key, name or NAMES[key], *tensors, 100 if key == "cifar100" else 10, mean, std, pad=4, flip=True)


def _digits(name: str) -> Data:
    """1,797 digits of 8 x 8 pixels in 17 greys; every fifth, 359, is for testing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy((images * (255 / 16)).round().astype(np.uint8)).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels.astype(np.int64))
    test = torch.arange(len(y)) % 5 == 4
    return Data("digits", name, x[~test], y[~test], x[test], y[test], 10, (0.305,), (0.376,), pad=1, flip=False)


# --- Files ------------------------------------------------------------------------------------------------------------


def _fashion(folder: Path) -> tuple:
    arrays = []
    for part in ("train", "t10k"):
        arrays += [_idx(folder, f"{part}-images-idx3-ubyte", 3)[:, None], _idx(folder, f"{part}-labels-idx1-ubyte", 1)]
        if len(arrays[-1]) != len(arrays[-2]):
            raise WrongData(f"{folder}: {len(arrays[-2]):,} images of {part}, but {len(arrays[-1]):,} labels")
    return arrays, (0.2860,), (0.3530,)


def _idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """The bytes in an IDX file: 0 0 8 (bytes) and the number of dimensions, each dimension in four bytes, then the content."""
    path = folder / name if (folder / name).exists() else folder / f"{name}.gz"
    content = _read(path, "fashion")
    shape = tuple(int.from_bytes(content[4 + 4 * d : 8 + 4 * d], "big") for d in range(dimensions))
    header, expected = 4 + 4 * dimensions, 4 + 4 * dimensions + math.prod(shape)
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise WrongData(f"{path} is no IDX file of bytes in {dimensions} dimensions: it begins with {content[:4].hex(' ')}")
    if len(content) != expected:
        raise WrongData(f"{path} should have {expected:,} bytes for {' x '.join(map(str, shape))}, but has {len(content):,}")
    if dimensions == 3 and shape[1:] != (28, 28):
        raise WrongData(f"{path} holds images of {shape[1]} x {shape[2]} pixels, not 28 x 28")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _cifar(key: str, train: list[str], test: list[str], label_bytes: int, mean: tuple, std: tuple):
    def read(folder: Path) -> tuple:
        arrays = []
        for names in (train, test):
            records = np.concatenate([_records(folder / name, key, label_bytes) for name in names])
            arrays += [records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1]]
        return arrays, mean, std

    return read


def _records(path: Path, key: str, label_bytes: int) -> np.ndarray:
    """Records of the label (CIFAR-100: of the superclass, of the class) and 32 x 32 red, green, blue values."""
    content, size = _read(path, key), label_bytes + 3 * 32 * 32
    if not content or len(content) % size:
        raise WrongData(f"{path} has {len(content):,} bytes, which is no multiple of {size:,}, a record of {NAMES[key]}: it is "
                        "cut short, or another file")  # fmt: skip
    return np.frombuffer(content, np.uint8).reshape(-1, size)


def _read(path: Path, key: str) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except FileNotFoundError:
        raise WrongData(f"there is no {path}: the folder has to hold {WHERE[key]}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise WrongData(f"{path} cannot be read ({error}): it is cut short, or another file") from None


def _check_labels(folder: Path, part: str, labels: np.ndarray, classes: int) -> None:
    if not len(labels):
        raise WrongData(f"{folder}: there are no {part} images")
    if labels.max() >= classes:
        raise WrongData(f"{folder}: a label of the {part} images is {labels.max()}, but there are {classes} classes")
    counts = np.bincount(labels, minlength=classes)
    if counts.min() != counts.max():  # else a file that is cut short between two records would not show
        raise WrongData(
            f"{folder}: there should be as many {part} images of each class, but of class {counts.argmin()} there are "
            f"{counts.min():,} and of class {counts.argmax()} {counts.max():,}: a file is cut short, or another one"
        )


_READERS = {
    "fashion": _fashion,
    "cifar10": _cifar("cifar10", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1,
                      (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": _cifar("cifar100", ["train.bin"], ["test.bin"], 2, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}  # fmt: skip

"""The images of the paper's experiments: what is read from files, what is refused, and how they are augmented; the networks."""

import gzip
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import shapes
from bench.paper import data, networks

pytest.importorskip("sklearn")


# --- Files


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A folder of 30 training and 20 test images, the labels gzipped, and what is in it."""
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 30), ("t10k", 20)):
        images = rng.integers(0, 256, (n, 28, 28), np.uint8)
        labels = rng.permutation(np.arange(n) % 10).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
        arrays[part] = images, labels
    return tmp_path, arrays


def test_idx_files(fashion):
    folder, arrays = fashion
    found = data.load("fashion", folder, "my clothes")
    assert (found.name, found.classes, found.channels) == ("my clothes", 10, 1)
    for part, x, y in (("train", found.train_x, found.train_y), ("t10k", found.test_x, found.test_y)):
        np.testing.assert_array_equal(x[:, 0].numpy(), arrays[part][0])
        np.testing.assert_array_equal(y.numpy(), arrays[part][1])


def write_cifar(folder, key, n=20):
    """Files of n records each; returns (training images, training labels, test labels), the images (., 32, 32, 3)."""
    rng = np.random.default_rng(1)
    classes = 10 if key == "cifar10" else 100
    files = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"] if key == "cifar10" else ["train.bin", "test.bin"]
    images, labels = [], []
    for name in files:
        content = b""
        images.append(rng.integers(0, 256, (n, 32, 32, 3), np.uint8))
        labels.append(rng.permutation(np.arange(n) % classes))
        for image, label in zip(images[-1], labels[-1], strict=True):
            superclass = [] if key == "cifar10" else [label % 20 + 100]  # no class: read as one it would be refused
            content += bytes([*superclass, label])
            content += b"".join(image[y, x, c].tobytes() for c in range(3) for y in range(32) for x in range(32))
        (folder / name).write_bytes(content)
    return np.concatenate(images[:-1]), np.concatenate(labels[:-1]), labels[-1]


@pytest.mark.parametrize(("key", "n"), [("cifar10", 20), ("cifar100", 100)])
def test_cifar_files(key, n, tmp_path):
    images, labels, test_labels = write_cifar(tmp_path, key, n)
    found = data.load(key, tmp_path)
    assert found.classes == (10 if key == "cifar10" else 100)
    np.testing.assert_array_equal(found.train_x.permute(0, 2, 3, 1).numpy(), images)
    np.testing.assert_array_equal(found.train_y.numpy(), labels)
    np.testing.assert_array_equal(found.test_y.numpy(), test_labels)


def test_digits_are_real():
    found = data.load("digits")
    assert found.train_x.shape == (1438, 1, 8, 8)
    assert found.test_x.shape == (359, 1, 8, 8)
    assert found.train_x.max() == 255
    normalized = found.normalized(found.train_x)
    assert abs(normalized.mean()) < 0.01
    assert abs(normalized.std() - 1) < 0.01


def cut(path, by):
    path.write_bytes(path.read_bytes()[:-by])


def overwrite(path, at, value):
    content = bytearray(path.read_bytes())
    content[at] = value
    path.write_bytes(bytes(content))


WRONG = {
    "no folder": (
        "cifar10",
        lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(),
        "is no folder: name the one that holds data_batch",
    ),
    "a file is missing": (
        "cifar10",
        lambda f: (f / "data_batch_3.bin").unlink(),
        "there is no .*data_batch_3.bin: the folder has to",
    ),
    "cut within a record": (
        "cifar10",
        lambda f: cut(f / "data_batch_2.bin", 5),
        "data_batch_2.bin has 61,455 bytes, which is no multiple",
    ),
    "cut between records": ("cifar10", lambda f: cut(f / "data_batch_2.bin", 3073), "as many training images of each class, but"),
    "empty": ("cifar10", lambda f: (f / "test_batch.bin").write_bytes(b""), "test_batch.bin has 0 bytes"),
    "a label out of range": (
        "cifar10",
        lambda f: overwrite(f / "test_batch.bin", 0, 10),
        "label of the test images is 10, but there are 10",
    ),
    "cifar-100 for cifar-10": ("cifar100", lambda f: cut(f / "train.bin", 1), "no multiple of 3,074, a record of CIFAR-100"),
    "idx cut short": (
        "fashion",
        lambda f: cut(f / "train-images-idx3-ubyte", 1),
        "should have 23,536 bytes for 30 x 28 x 28, but has 23,535",
    ),
    "gzip cut short": ("fashion", lambda f: cut(f / "t10k-labels-idx1-ubyte.gz", 9), "cannot be read .*: it is cut short"),
    "not idx": ("fashion", lambda f: overwrite(f / "train-images-idx3-ubyte", 2, 9), "no IDX file of bytes in 3 dimensions"),
    "no image": ("fashion", lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03"), "no IDX file"),
    "labels of other images": (
        "fashion",
        lambda f: (f / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(30, dtype=np.uint8) % 10))),
        "20 images of t10k, but 30 labels",
    ),
    "other pixels": (
        "fashion",
        lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((20, 28, 29), np.uint8))),
        "28 x 29",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_told(case, fashion, tmp_path_factory):
    key, spoil, message = WRONG[case]
    folder = fashion[0]
    if key != "fashion":
        folder = tmp_path_factory.mktemp(key)
        write_cifar(folder, key, 100 if key == "cifar100" else 20)
    data.load(key, folder)  # it was right before
    spoil(folder)
    with pytest.raises(data.WrongData, match=message):
        data.load(key, folder)


def test_unknown_data():
    with pytest.raises(ValueError, match="no data 'mnist' .allowed: digits, fashion, cifar10, cifar100."):
        data.load("mnist")


# --- Augmentation


@pytest.fixture
def images(tmp_path):
    write_cifar(tmp_path, "cifar10", 40)
    return data.Augmented(data.load("cifar10", tmp_path))


def test_a_batch_is_the_crops_and_flips_of_its_rows(images):
    """One image at a time: black borders of four pixels, a window, a mirror, the normalisation of CIFAR's usual figures."""
    rows = images.epoch(0, 1)[:64]
    found, labels = images.batch(rows)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2023, 0.1994, 0.2010])
    for (index, top, left, flipped), image, label in zip(rows.tolist(), found.numpy(), labels.tolist(), strict=True):
        padded = np.pad(images.data.train_x[index].numpy().transpose(1, 2, 0), ((4, 4), (4, 4), (0, 0)))
        expected = padded[top : top + 32, left : left + 32]
        expected = expected[:, ::-1] if flipped else expected
        np.testing.assert_allclose(image.transpose(1, 2, 0), (expected / 255 - mean) / std, rtol=1e-5, atol=1e-6)
        assert label == images.data.train_y[index]


def test_an_epoch_shows_each_image_once_and_depends_on_seed_and_number(images):
    first = images.epoch(0, 1)
    assert torch.equal(first, images.epoch(0, 1))
    for seed, epoch in ((0, 2), (1, 1), (1, 0)):
        other = images.epoch(seed, epoch)
        assert sorted(other[:, 0].tolist()) == list(range(200))
        assert (other == first).all(0).tolist() == [False] * 4
    rows = torch.cat([images.epoch(0, k) for k in range(20)])
    for column, values in ((1, 9), (2, 9), (3, 2)):
        counts = rows[:, column].bincount(minlength=values)
        assert len(counts) == values
        assert (counts - 4000 / values).abs().max() < 5 * math.sqrt(4000 / values)


def test_digits_are_not_mirrored():
    digits = data.Augmented(data.load("digits"))
    assert digits.epoch(0, 1).amax(0).tolist() == [1437, 2, 2, 0]


# --- Networks


@pytest.mark.parametrize(
    ("key", "classes", "parameters", "gflop"),
    [
        ("resnet34", 10, 21_282_122, 2.319),
        ("resnet34", 100, 21_328_292, 2.319),
        ("resnet18", 10, 11_173_962, 1.111),
        ("densenet121", 10, 6_956_298, 1.777),
        ("densenet121", 100, 7_048_548, 1.777),
    ],
)
def test_networks_have_the_known_sizes(key, classes, parameters, gflop):
    """Operations too: they tell a stride or a pooling that is somewhere else."""
    model = networks.make(key, 3, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, classes)
    assert flops.get_total_flops() / 1e9 == pytest.approx(gflop, rel=1e-3)
    if classes == 10 and key in shapes.NETWORKS:
        assert [tuple(p.shape) for p in model.parameters()] == shapes.NETWORKS[key][1]()


@pytest.mark.parametrize("key", networks.TITLES)
def test_every_parameter_matters(key):
    model = networks.make(key, 3, 5, width=1 / 16)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"), [(("vgg", 3, 10), "no network 'vgg'"), (("small", 3, 10, 0.0), "the width is 0.0")]
)
def test_wrong_networks(arguments, message):
    with pytest.raises(ValueError, match=message):
        networks.make(*arguments)

"""Image sets in the files that the field ships them in, split into three parts."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from etils.epath import Path

from experiments.jobs.data import Images, Parts

PLACES = (
    Path("/usr/share/datasets/fashion-mnist"),
    Path("data/usr/share/datasets/fashion-mnist"),
)
"""Where Fashion-MNIST is looked for."""

_GET = (
    "Fashion-MNIST is a Debian package, which needs no root to unpack here:\n"
    "  apt-get download dataset-fashion-mnist && "
    "dpkg -x dataset-fashion-mnist_*.deb data"
)


class ImageSet(NamedTuple):
    """A set of images.

    Attributes:
      parts: ``x``, uint8 ``[N, H, W, C]``, and ``label``, int32 ``[N]``.
      classes: how many there are.
      fingerprint: a text that differs where the images do.
    """

    parts: Parts
    classes: int
    fingerprint: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        height, width, channels = self.parts.train["x"].shape[1:]
        return height, width, channels


def load(folder: Path | None, validation: int) -> ImageSet:
    """Loads a set and sets a fixed part of its training images apart.

    Args:
      folder: with IDX files (plain or gzipped) or CIFAR's binary files; ``None`` looks
        for Fashion-MNIST in :data:`PLACES`.
      validation: how many training images become the validation part; the same ones
        always.

    Raises:
      ValueError: a file is not what its name says, or too few images.
      OSError: there is no such set, or it cannot be read.
    """
    train, test = _read(_found(folder))
    count = len(train["x"])
    if not 0 < validation < count:
        raise ValueError(
            f"--validation: got {validation}; expected 1 to {count - 1}, fewer than "
            f"the {count} training images."
        )
    order = np.random.default_rng(0).permutation(count)
    kept, apart = np.sort(order[:-validation]), np.sort(order[-validation:])
    parts = Parts(_rows(train, kept), _rows(train, apart), test)
    if train["x"].shape[1:] != test["x"].shape[1:]:
        raise ValueError(
            f"--data-dir: images of the test part are {test['x'].shape[1:]}; expected "
            f"those of the training part, {train['x'].shape[1:]}."
        )
    classes = int(train["label"].max()) + 1
    if test["label"].max() >= classes:
        raise ValueError(
            f"--data-dir: the test part has class {test['label'].max()}; expected "
            f"those of the training part, below {classes}."
        )
    checksum = 0
    for array in (*train.values(), *test.values()):
        checksum = zlib.crc32(array.tobytes(), checksum)
    return ImageSet(parts, classes, f"images {checksum:08x}")


def _found(folder: Path | None) -> Path:
    if folder is None:
        for place in PLACES:
            if place.is_dir():
                return place
        looked = " or ".join(map(str, PLACES))
        raise OSError(f"--data-dir: found no images in {looked}.\n{_GET}")
    if not folder.is_dir():
        raise OSError(f"--data-dir: {folder} is no folder.\n{_GET}")
    return folder


def _read(folder: Path) -> tuple[Images, Images]:
    """The training and the test part of the set in a folder."""
    for name, read in (
        ("cifar-10-batches-bin", _read_cifar10),
        ("cifar-100-binary", _read_cifar100),
    ):
        for place in (folder / name, folder):
            if place.name == name and place.is_dir():
                return read(place)
    return _read_idx(folder, ["train"]), _read_idx(folder, ["t10k", "test"])


def _read_idx(folder: Path, names: Iterable[str]) -> Images:
    images = _one_of(folder, [f"*{name}*images*idx[34]*" for name in names])
    labels = _one_of(folder, [f"*{name}*labels*idx1*" for name in names])
    x, label = _idx(images), _idx(labels)
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or x.shape[-1] not in (1, 3):
        raise ValueError(
            f"{images}: got shape {x.shape}; expected [N, H, W] or [N, H, W, C] with "
            "1 or 3 channels."
        )
    if label.ndim != 1 or len(label) != len(x) or not len(x):
        raise ValueError(
            f"{labels}: got shape {label.shape}; expected one label for each of the "
            f"{len(x)} images in {images.name}."
        )
    return {"x": x, "label": label.astype(np.int32)}


def _one_of(folder: Path, patterns: list[str]) -> Path:
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    # A file and its gzipped self are one.
    whole = {path.name.removesuffix(".gz"): path for path in found}
    if len(whole) != 1:
        got = ", ".join(sorted(whole)) or "none"
        raise OSError(
            f"--data-dir: {folder} has {got}; expected one file like "
            f"{' or '.join(patterns)}, or CIFAR's cifar-10-batches-bin or "
            f"cifar-100-binary.\n{_GET}"
        )
    return next(iter(whole.values()))


def _idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: a magic number, sizes of 4 bytes, values."""
    content = _content(path)
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 4:
        raise ValueError(
            f"{path}: starts with {content[:4].hex(' ')}; expected 00 00 08 0n, an IDX "
            "file of bytes with n axes."
        )
    axes = content[3]
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * axes], ">u4").tolist())
    expected = 4 + 4 * axes + math.prod(shape)
    if len(shape) != axes or len(content) != expected:
        raise ValueError(
            f"{path}: got {len(content)} bytes; expected {expected} for shape {shape}. "
            "Is the file cut short?"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _content(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: {error}; expected a whole file in gzip's format."
        ) from error


def _read_cifar10(folder: Path) -> tuple[Images, Images]:
    train = [_cifar(folder / f"data_batch_{n}.bin", 1, 10) for n in range(1, 6)]
    joined = {name: np.concatenate([each[name] for each in train]) for name in train[0]}
    return joined, _cifar(folder / "test_batch.bin", 1, 10)


def _read_cifar100(folder: Path) -> tuple[Images, Images]:
    # The first label is the superclass.
    return _cifar(folder / "train.bin", 2, 100), _cifar(folder / "test.bin", 2, 100)


def _cifar(path: Path, labels: int, classes: int) -> Images:
    """Records of labels and 3 x 32 x 32 bytes, of which the last label counts."""
    size = labels + 3 * 32 * 32
    content = np.frombuffer(path.read_bytes(), np.uint8)
    if not len(content) or len(content) % size:
        raise ValueError(
            f"{path}: got {len(content)} bytes; expected a multiple of {size}, those "
            "of one image with its label. Is the file cut short?"
        )
    records = content.reshape(-1, size)
    label = records[:, labels - 1].astype(np.int32)
    if label.max() >= classes:
        raise ValueError(f"{path}: got class {label.max()}; expected below {classes}.")
    x = records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return {"x": np.ascontiguousarray(x), "label": label}


def _rows(images: Images, rows: np.ndarray) -> Images:
    return {name: array[rows] for name, array in images.items()}

"""The vision benchmark's image files: read whole, or refused by name."""

import gzip
import re

import numpy as np
import pytest

from experiments.vision import data
from experiments.vision.main import main
from tests.experiments.image_files import CLASSES, SHAPE, write_idx, write_set


@pytest.mark.parametrize(
    ("shape", "suffix"), [(SHAPE, ""), (SHAPE, ".gz"), ((6, 9, 3), ".gz")]
)
def test_idx_files_of_any_size(tmp_path, shape, suffix):
    images = data.load(write_set(tmp_path, shape, suffix=suffix), validation=16)
    assert images.shape == shape
    assert images.classes == CLASSES
    assert [len(part["x"]) for part in images.parts] == [80, 16, 40]
    assert images.parts.train["x"].dtype == np.uint8
    again = data.load(tmp_path, validation=16)
    assert again.fingerprint == images.fingerprint
    np.testing.assert_array_equal(again.parts.train["x"], images.parts.train["x"])
    together = np.concatenate([images.parts.train["x"], images.parts.validation["x"]])
    assert len(np.unique(together.reshape(96, -1), axis=0)) == 96


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path, classes):
    rng = np.random.default_rng(0)
    extra = [7] if classes == 100 else []
    folder = tmp_path / (
        "cifar-100-binary" if classes == 100 else "cifar-10-batches-bin"
    )
    folder.mkdir()
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    names = names if classes == 10 else ["train.bin", "test.bin"]
    first = rng.integers(0, 256, (3, 32, 32), np.uint8)
    for name in names:
        records = [
            bytes([*extra, label])
            + (first if label == 0 else rng.integers(0, 256, (3, 32, 32), np.uint8))
            .transpose(0, 1, 2)
            .tobytes()
            for label in range(classes)
        ]
        (folder / name).write_bytes(b"".join(records))
    # Found beside others, or pointed at.
    for place in (tmp_path, folder):
        images = data.load(place, validation=1)
        assert images.shape == (32, 32, 3)
        assert images.classes == classes
    test = images.parts.test
    assert test["label"].tolist() == list(range(classes))
    np.testing.assert_array_equal(test["x"][0], first.transpose(1, 2, 0))


def cut_short(folder):
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])


def wrong_magic(folder):
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x0d\x01\0\0\0\1\0")


def too_few_labels(folder):
    write_idx(folder / "train-labels-idx1-ubyte", np.zeros(95))


def no_test_images(folder):
    (folder / "t10k-images-idx3-ubyte").unlink()


def broken_gzip(folder):
    path = folder / "train-labels-idx1-ubyte"
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(b"\0" * 99)[:20])


def larger_test_images(folder):
    images = np.zeros((40, 10, 8), np.uint8)
    write_idx(folder / "t10k-images-idx3-ubyte", images)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            larger_test_images,
            r"--data-dir: .*test part are \(10, 8, 1\); .* \(8, 8, 1\)",
        ),
        (cut_short, r"train-images-idx3-ubyte: got 6155 bytes; expected 6160 .*short"),
        (wrong_magic, r"t10k-labels-idx1-ubyte: starts with 00 00 0d 01; expected"),
        (too_few_labels, r"train-labels-idx1.* got shape \(95,\); .* each of the 96"),
        (no_test_images, r"has none; expected one file like \*t10k\*images"),
        (broken_gzip, r"train-labels-idx1-ubyte.gz: .*expected a whole file"),
    ],
)
def test_bad_files_are_refused(spoil, told, tmp_path, capsys):
    spoil(write_set(tmp_path / "set"))
    given = [f"--data-dir={tmp_path / 'set'}", f"--out={tmp_path / 'out'}"]
    assert main([*given, "--validation=16"]) == 2
    assert re.search(told, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "out").exists()


def test_without_images_it_is_told_how_to_get_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "PLACES", (tmp_path / "none",))
    assert main([f"--out={tmp_path / 'out'}"]) == 2
    assert "apt-get download dataset-fashion-mnist" in capsys.readouterr().err


def test_a_cut_cifar_file_is_refused(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "train.bin").write_bytes(b"\0" * 3074)
    (folder / "test.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(ValueError, match=r"test.bin: got 3000 bytes; .* 3074"):
        data.load(tmp_path, validation=1)

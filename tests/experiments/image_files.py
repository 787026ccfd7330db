"""Image sets in IDX files, small and random."""

import gzip
import struct

import numpy as np

SHAPE, CLASSES = (8, 8, 1), 4
# Of which the last map of a small network has more than one position.
LARGER = (16, 16, 1)


def write_idx(path, array):
    content = b"\0\0\x08" + bytes([array.ndim])
    content += b"".join(struct.pack(">I", size) for size in array.shape)
    content += array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_set(folder, shape=SHAPE, train=96, test=40, suffix=""):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    axes = "idx3" if shape[-1] == 1 else "idx4"
    for part, count in (("train", train), ("t10k", test)):
        size = shape[:-1] if shape[-1] == 1 else shape
        x = rng.integers(0, 256, (count, *size))
        write_idx(folder / f"{part}-images-{axes}-ubyte{suffix}", x)
        labels = np.arange(count) % CLASSES
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return folder

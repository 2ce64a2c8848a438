"""Fashion-MNIST in small, for the tests of ``came8bit tradeoff``."""

import gzip
import struct

import numpy as np


def write_fashion_mnist(folder):
    """Write small files in the format of Fashion-MNIST: 5,200 and 40 random images."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for part, count in (("train", 5200), ("t10k", 40)):
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8) // 4
        images += 19 * labels[:, None, None]  # something to learn
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            raw = gzip.compress(head + array.tobytes(), compresslevel=1)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(raw)

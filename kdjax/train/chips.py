"""What a chip can do, from its maker's tables."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """Limits of one chip, none of which a program reaches in full.

    Attributes:
      memory: bytes of its main memory.
      bandwidth: bytes that it reads and writes there, per second.
      flops: in bfloat16 with sums in float32, per second, without sparsity.
      links: bytes that it sends to other chips per second, over all of its links.
    """

    memory: float
    bandwidth: float
    flops: float
    links: float


# By what JAX calls the device. TPUs: cloud.google.com/tpu/docs, pages v4, v5e, v5p and
# v6e, whose memory is in units of 2**30; links are one direction, half of what is told
# for both. A v4 has six links of 50 GB/s (Jouppi et al., TPU v4, 2023, table 4.
# arXiv:2304.01433). GPUs: the data sheets of the SXM forms, NVLink in one direction.
_CHIPS = {
    "TPU v4": Chip(32 * 2**30, 1228e9, 275e12, 300e9),
    "TPU v5 lite": Chip(16 * 2**30, 819e9, 197e12, 200e9),
    "TPU v5": Chip(95 * 2**30, 2765e9, 459e12, 600e9),
    "TPU v6 lite": Chip(32 * 2**30, 1638e9, 918e12, 400e9),
    "NVIDIA A100-SXM4-40GB": Chip(40e9, 1555e9, 312e12, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(80e9, 2039e9, 312e12, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(80e9, 3350e9, 989e12, 450e9),
    "NVIDIA H200": Chip(141e9, 4800e9, 989e12, 450e9),
}
_CHIPS["TPU v5p"], _CHIPS["TPU v5e"] = _CHIPS["TPU v5"], _CHIPS["TPU v5 lite"]
_CHIPS["TPU v6e"] = _CHIPS["TPU v6 lite"]


def chip_of(device_kind: str) -> Chip | None:
    """The limits of a device, by ``device.device_kind``; ``None`` if not known.

    Example:
      >>> chip_of("TPU v5 lite").flops / 1e12
      197.0
      >>> chip_of("cpu")
    """
    return _CHIPS.get(device_kind)

"""The same losses and parameters on every number of devices, in every form."""

import functools

import numpy as np
import pytest

from tests.train import scale

# Kinds of meshes by number of devices.
DATA = [{"data": count} for count in (1, 2, 4, 8)]
FSDP = [{"fsdp": count} for count in (2, 4, 8)]
BOTH = [
    {"data": 1, "fsdp": 2, "tensor": 1},
    {"fsdp": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


@functools.cache
def alone(dtype, accumulate=1):
    """One device, under a plain ``jax.jit``."""
    return scale.run(dtype=dtype, accumulate=accumulate)


def assert_same(got, expected, dtype):
    """To 1e-10 in float64; the losses to 1e-5 in float32."""
    exact = dtype == np.float64
    tolerance = 1e-10 if exact else 1e-5
    assert np.ptp(expected.losses) > 0.1  # it trains
    np.testing.assert_allclose(got.losses, expected.losses, tolerance, tolerance)
    for name in ("params", "statistics") if exact else ():
        pairs = zip(getattr(got, name), getattr(expected, name), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, 1e-10, 1e-10, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("axes", DATA + FSDP + BOTH, ids=str)
def test_jit(axes):
    assert_same(scale.run("jit", axes), alone(np.float64), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("axes", DATA, ids=str)
def test_pmap(axes):
    assert_same(scale.run("pmap", axes), alone(np.float64), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("axes", DATA + FSDP + BOTH[1:], ids=str)
def test_shard_map(axes):
    axis_name = "data" if "data" in axes else "fsdp"
    got = scale.run("shard_map", axes, axis_name=axis_name)
    assert_same(got, alone(np.float64), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "axes"),
    [
        ("jit", DATA[-1]),
        ("jit", FSDP[-1]),
        ("jit", BOTH[-1]),
        ("shard_map", DATA[-1]),
        ("shard_map", BOTH[-1]),
        ("pmap", DATA[-1]),
    ],
    ids=str,
)
def test_float32(form, axes):
    got = scale.run(form, axes, dtype=np.float32)
    assert_same(got, alone(np.float32), np.float32)

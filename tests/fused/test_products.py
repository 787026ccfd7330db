"""Matrix products of a chunk on one CPU, in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.fused import _products


@pytest.fixture
def one_cpu(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def assert_in_parts(function, arrays, expected, part):
    found = jax.jit(function)(*arrays)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert part in str(jax.make_jaxpr(function)(*arrays))


# A single part, equal ones, and a last one that is smaller.
@pytest.mark.parametrize(("width", "part"), [(3, 3), (10, 5), (7, 4)])
def test_the_kernels_gradient_is_added_part_by_part(width, part, one_cpu):
    sums, hidden, slopes = draw((width, 6), (5, width), (5, 6))
    expected = sums + hidden.T @ slopes
    arrays = sums, hidden, slopes
    assert_in_parts(_products.with_kernel_gradient, arrays, expected, f"f32[{part},5]")


# Equal parts, and a last one that reaches back over one class and over two.
@pytest.mark.parametrize(("classes", "part"), [(8, 4), (7, 4), (10, 4)])
def test_a_large_kernel_is_multiplied_part_by_part(classes, part, one_cpu, monkeypatch):
    slopes, kernel = draw((5, classes), (3, classes))
    monkeypatch.setattr(_products, "PART_BYTES", 4 * 3 * 4)
    monkeypatch.setattr(_products, "WHOLE_BYTES", 4 * kernel.size - 1)
    # Of classes that come twice, none counts twice, whatever it is.
    slopes = slopes.at[:, -part].set(jnp.inf)
    expected = slopes @ kernel.T
    assert not np.isnan(expected).any()
    arrays = slopes, kernel
    assert_in_parts(_products.hidden_gradient, arrays, expected, f"f32[5,{part}]")
    monkeypatch.setattr(_products, "WHOLE_BYTES", 4 * kernel.size)
    jax.clear_caches()
    program = str(jax.make_jaxpr(_products.hidden_gradient)(*arrays))
    assert f"f32[5,{part}]" not in program

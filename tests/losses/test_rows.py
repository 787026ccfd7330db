"""How rows are worked through changes time and memory, never the numbers.

The other tests run on eight devices, hence on all rows at once; here are the blocks of
a lone CPU, and the fewer passes of a TPU.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from kdjax.losses import _blocks, _rows

OF_LABELS = {"knowledge_distillation", "cross_entropy"}
NAMES = [
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_kl",
    "knowledge_distillation",
    "cross_entropy",
]
# Those whose derivatives are a single pass.
SINGLE = ["forward_kl", "reverse_kl", "knowledge_distillation", "cross_entropy"]


def draw(shape, dtype=np.float64, distance=None):
    rng = np.random.default_rng(0)
    student, noise = rng.normal(0, 3, shape), rng.normal(0, 1, shape)
    teacher = 3 * noise if distance is None else student + distance * noise
    labels = rng.integers(-1, shape[-1], shape[:-1])
    sides = (jnp.asarray(side, dtype) for side in (student, teacher))
    return *sides, jnp.asarray(labels)


def loss_of(name, student, teacher, labels, **options):
    sides = (student,) if name == "cross_entropy" else (student, teacher)
    extra = (labels,) if name in OF_LABELS else ()
    return getattr(losses, name)(*sides, *extra, **options)


def value_and_gradients(name, student, teacher, labels, **options):
    def loss(student, teacher):
        return loss_of(name, student, teacher, labels, **options)

    @jax.jit
    def program(student, teacher):
        rows, pull = jax.vjp(loss, student, teacher)
        return rows, *pull(jnp.ones_like(rows))

    # A compiled loss is kept for its shapes, whichever way it was compiled.
    jax.clear_caches()
    return program(student, teacher)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def in_blocks(monkeypatch):
    """As on one CPU, with blocks of 16 entries; tells whether there were any."""
    loops = []

    def counted(loop):
        def run(*args):
            loops.append(loop)
            return loop(*args)

        return run

    def use():
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        monkeypatch.setattr(_rows, "_BLOCK", 16)
        monkeypatch.setattr(_rows, "_LEAST_ROWS", 2)
        monkeypatch.setattr(_rows, "_BLOCKS", 1)
        # So that the largest logit is often not among them.
        monkeypatch.setattr(_rows, "_SOME", 2)
        for name in ("reduced", "in_place"):
            monkeypatch.setattr(_blocks, name, counted(getattr(_blocks, name)))
        return loops

    yield use
    jax.clear_caches()


# Blocks that fit, over two axes, with a rest, of few classes and of more than fit.
SHAPES = [(8, 4), (3, 5, 4), (5, 2, 3), (2, 3, 9)]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("forward_kl", (7, 4)),
        *(pytest.param(name, (7, 4), marks=pytest.mark.slow) for name in NAMES[1:]),
        *(pytest.param(NAMES[0], shape, marks=pytest.mark.slow) for shape in SHAPES),
    ],
)
def test_blocks_equal_the_whole(name, shape, in_blocks, x64):
    arrays = draw(shape)
    expected = value_and_gradients(name, *arrays)
    loops = in_blocks()
    found = value_and_gradients(name, *arrays)
    assert loops
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


def test_what_fits_into_the_caches_is_not_cut(in_blocks, monkeypatch):
    blocks = _rows._BLOCKS
    loops = in_blocks()
    monkeypatch.setattr(_rows, "_BLOCKS", blocks)
    value_and_gradients("forward_kl", *draw((4, 4), np.float32))
    assert not loops
    value_and_gradients("forward_kl", *draw((5, 4), np.float32))
    assert loops


def temporaries(name, rows):
    """Bytes beside the gradients of the hidden states and the kernel of logits."""
    labels = jnp.zeros(rows, int)

    def total(hidden, kernel, teacher):
        return loss_of(name, hidden @ kernel, teacher, labels).sum()

    shapes = [(*rows, 8), (8, 256), (*rows, 256)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    gradients = jax.jit(jax.grad(total, (0, 1)))
    return gradients.lower(*arrays).compile().memory_analysis().temp_size_in_bytes


# As many rows as blocks have, and some more.
@pytest.mark.parametrize("rows", [256, 259])
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("forward_kl", 1),
        # After the blocks a product with the cotangent, too.
        ("jensen_shannon", 2),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in SINGLE[1:]),
        pytest.param("skew_kl", 2, marks=pytest.mark.slow),
    ],
)
def test_the_gradient_takes_the_place_of_logits(
    name, count, rows, in_blocks, monkeypatch
):
    loops = in_blocks()
    monkeypatch.setattr(_rows, "_BLOCK", 1024)
    whole, blocks = rows * 256 * 4, 20 * 1024 * 4
    assert whole <= temporaries(name, (rows,)) < count * whole + blocks
    assert loops


@pytest.mark.parametrize("name", ["forward_kl", "knowledge_distillation"])
def test_a_gradient_with_two_users_is_made_once(name, in_blocks, monkeypatch):
    loops = in_blocks()
    monkeypatch.setattr(_rows, "_BLOCK", 1024)
    # The kernel's gradient wants it transposed, in one array more. Made for each of its
    # users, it would be made of powers that take one or two more.
    whole, blocks = 256 * 256 * 4, 20 * 1024 * 4
    assert temporaries(name, (4, 64)) < 2 * whole + blocks
    assert loops


# Of five classes, the blocks look for the largest logit in two.
FAR = {
    "further than is rounded well": ([0, 1, 17.5, 17, 3], [0, 1, 17, 18, 3]),
    "beyond the range of powers": ([0, 1, 300, 299, 3], [1, 0, 299, 300, 200]),
    "on one side": ([0, 1, 2, 3, 4], [0, 1, 2, 150, 149]),
    "where the two are out": (
        [-np.inf, -np.inf, -1000, -1001, -1002],
        [-np.inf, -np.inf, -1001, -1000, -1003],
    ),
    "above all others": ([300, 299, 1, 0, 2], [299, 300, 2, 1, 0]),
}


@pytest.mark.parametrize("rows", FAR.values(), ids=FAR)
@pytest.mark.parametrize("name", SINGLE)
def test_the_largest_logit_may_be_far(name, rows, in_blocks, x64):
    sides = [np.tile(np.float32(side), (6, 1)) for side in rows]
    # Rows beside it that need nothing of the kind.
    for each in sides:
        each[[0, 3, 4]] = np.arange(5)
    labels = jnp.full(6, 3)
    expected = value_and_gradients(name, *map(np.float64, sides), labels)
    loops = in_blocks()
    found = value_and_gradients(name, *sides, labels)
    assert loops
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
def test_vmap_and_second_derivatives_in_blocks(in_blocks, x64):
    student, teacher, _ = draw((3, 6, 4))

    def curvature(student, teacher):
        def total(student):
            return losses.jensen_shannon(student, teacher, temperature=2.0).sum()

        grad = jax.grad(total)
        return jax.jvp(grad, (student,), (teacher,))[1]

    def run():
        jax.clear_caches()
        program = jax.jit(jax.vmap(curvature))
        return program(student, teacher)

    expected = run()
    in_blocks()
    found = run()
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)


@pytest.fixture
def as_on_tpu(monkeypatch):
    """The program for a TPU, computed here."""

    def on_tpu(*args, default, tpu=None, **_):
        return (tpu or default)(*args)

    yield lambda: monkeypatch.setattr(jax.lax, "platform_dependent", on_tpu)
    jax.clear_caches()


@pytest.fixture
def compile_for(as_on_tpu, in_blocks):
    """From here on, for that device."""
    return {"tpu": as_on_tpu, "one cpu": in_blocks}


# A TPU has ways of its own for the first three, one CPU for the KLs.
elsewhere_too = pytest.mark.parametrize(
    ("name", "device"),
    [
        ("forward_kl", "tpu"),
        ("forward_kl", "one cpu"),
        ("knowledge_distillation", "one cpu"),
        pytest.param("reverse_kl", "tpu", marks=pytest.mark.slow),
        pytest.param("jensen_shannon", "tpu", marks=pytest.mark.slow),
        pytest.param("reverse_kl", "one cpu", marks=pytest.mark.slow),
    ],
)


@elsewhere_too
@pytest.mark.parametrize(
    ("distance", "temperature"), [(None, 1.0), (1e-4, 1.0), (1e-2, 100.0)]
)
def test_its_own_way_costs_no_digits(
    name, device, distance, temperature, compile_for, x64
):
    arrays = draw((4, 50), np.float32, distance)
    options = {"temperature": temperature}
    wide = [each.astype(jnp.float64) for each in arrays[:2]]
    expected = value_and_gradients(name, *wide, arrays[2], **options)
    compile_for[device]()
    found = value_and_gradients(name, *arrays, **options)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float32
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert error < 3e-6


@pytest.mark.parametrize("name", SINGLE[:3])
def test_a_block_may_hold_rows_near_and_far(name, in_blocks, monkeypatch, x64):
    student, noise, labels = draw((12, 16), np.float32, distance=1.0)
    noise -= student
    # Divergences from 1e-8 to 10; from 0.5 on they are found with less arithmetic.
    distances = [4, 1e-4, 3, 1e-3, 0, 0.9, 3, 2, 4, 1.3, 1, 1.1]
    teacher = student + jnp.float32(distances)[:, None] * noise
    labels = jnp.abs(labels).at[2].set(-1)
    wide = [each.astype(jnp.float64) for each in (student, teacher)]
    expected = value_and_gradients(name, *wide, labels)
    loops = in_blocks()
    monkeypatch.setattr(_rows, "_BLOCK", 2 * 16)
    found = value_and_gradients(name, student, teacher, labels)
    assert loops
    for one, other in zip(found, expected, strict=True):
        error, size = (
            np.linalg.norm(each.reshape(12, -1), axis=1)
            for each in (one - other, other)
        )
        assert (error <= 2e-6 * size).all()


@elsewhere_too
def test_its_own_way_at_the_edges(name, device, compile_for, x64):
    student, teacher, labels = draw((6, 5), np.float32)
    out = np.zeros((6, 5), bool)
    out[0], out[1, 2:], out[2, 1:] = True, True, True
    student = jnp.where(out, -jnp.inf, student).at[3].add(1e4)
    teacher = jnp.where(out, -jnp.inf, teacher).at[4].multiply(1e4)
    # Labels of classes that are out would cost infinity.
    labels = jnp.where(out[np.arange(6), labels], -1, labels)
    wide = [each.astype(jnp.float64) for each in (student, teacher)]
    expected = value_and_gradients(name, *wide, labels)
    compile_for[device]()
    found = value_and_gradients(name, student, teacher, labels)
    for one, other in zip(found, expected, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_blocks_hide_no_nan_and_no_infinity(side, in_blocks):
    sides = dict(zip(("student", "teacher"), draw((8, 5), np.float32), strict=False))
    sides[side] = sides[side].at[1, 2].set(jnp.nan).at[6, 3].set(-jnp.inf)
    loops = in_blocks()
    # A compiled loss is kept for its shapes, whichever way it was compiled.
    jax.clear_caches()
    found = losses.forward_kl(sides["student"], sides["teacher"])
    assert loops
    assert jnp.isnan(found).tolist() == [row == 1 for row in range(8)]
    assert jnp.isinf(found).tolist() == [
        side == "student" and row == 6 for row in range(8)
    ]


def test_blocks_of_equal_rows_are_zero(in_blocks):
    student, _, labels = draw((9, 7), np.float32)
    loops = in_blocks()
    value, *gradients = value_and_gradients("forward_kl", student, student, labels)
    assert loops
    assert not value.any()
    assert not any(gradient.any() for gradient in gradients)
    # Shifted, they are equal up to the rounding of the logits.
    value, *_ = value_and_gradients("forward_kl", student + 0.1, student, labels)
    assert (value >= 0).all()
    assert (value < 1e-12).all()


ALONE = """
import jax, jax.numpy as jnp, numpy as np
from kdjax import losses

shape = rows, classes = 8000, 1000
rng = np.random.default_rng(0)
student, teacher = (jnp.float32(rng.normal(0, 3, shape)) for _ in range(2))
labels = jnp.asarray(rng.integers(-1, classes, rows))

def loss(*arrays):
    return losses.knowledge_distillation(*arrays, temperature=2.0)

def gradient(*arrays):
    values, pull = jax.vjp(lambda student: loss(student, *arrays[1:]), arrays[0])
    return values, *pull(jnp.ones_like(values))

program = jax.jit(gradient).lower(student, teacher, labels).compile()
found = program(student, teacher, labels)
# What is kept of the logits' size would make 1 and more; the blocks, of half a million
# entries in eight million, make less.
assert program.memory_analysis().temp_size_in_bytes < student.nbytes
for part in (slice(0, 300), slice(-300, None)):
    expected = jax.jit(gradient)(student[part], teacher[part], labels[part])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[part], other, rtol=1e-5, atol=1e-6)
print(jax.device_count(), "device")
"""


def test_one_cpu_needs_no_copy_of_the_logits():
    command = [sys.executable, "-c", ALONE]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    assert answer.stdout == "1 device\n"

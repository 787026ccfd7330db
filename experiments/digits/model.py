"""The two networks: 58,634 parameters and 1,898."""

from __future__ import annotations

from flax import nnx
from jax import Array

from experiments.digits.data import CLASSES
from experiments.jobs.networks import seeded_key
from kdjax import Adapted
from kdjax.models import from_nnx


class TeacherNet(nnx.Module):
    """Three convolutions with batch normalisation, then dropout."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(32, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.norm2 = nnx.BatchNorm(64, rngs=rngs)
        self.conv3 = nnx.Conv(64, 64, (3, 3), strides=2, rngs=rngs)
        self.norm3 = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(2 * 2 * 64, CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = nnx.relu(self.norm3(self.conv3(x)))
        return self.head(self.dropout(x.reshape(len(x), -1)))


class StudentNet(nnx.Module):
    """Two small convolutions."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(2 * 2 * 16, CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.conv1(x))
        x = nnx.relu(self.conv2(x))
        return self.head(x.reshape(len(x), -1))


# Compiled as a whole: drawing weights one array at a time compiles a program for
# each shape, which takes longer than the training.
@nnx.jit
def _teacher(key: Array) -> TeacherNet:
    return TeacherNet(rngs=nnx.Rngs(key))


@nnx.jit
def _student(key: Array) -> StudentNet:
    return StudentNet(rngs=nnx.Rngs(key))


def teacher_net(seed: int) -> Adapted:
    """The teacher with the initial weights of a seed."""
    return from_nnx(_teacher(seeded_key(seed)))


def student_net(seed: int) -> Adapted:
    """The student with the initial weights of a seed."""
    return from_nnx(_student(seeded_key(seed)))

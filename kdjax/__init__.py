"""kdjax: functional knowledge distillation for JAX and Flax.

The public face: loss functions, also over linear heads, the core types, and the
training step. Adapters are in :mod:`kdjax.models`, objectives in
:mod:`kdjax.objectives`, teachers in :mod:`kdjax.teachers`, metrics in
:mod:`kdjax.metrics`, the loop in :mod:`kdjax.train`, files in :mod:`kdjax.io`.
Importing this loads no flax.
"""

from kdjax import fused, losses
from kdjax.train.step import make_train_step
from kdjax.types import (
    Adapted,
    AlignedLogits,
    LinearHead,
    Mean,
    Model,
    Objective,
    Outputs,
    SampledTargets,
    SparseTargets,
    Teacher,
    Term,
)

__all__ = [
    "Adapted",
    "AlignedLogits",
    "LinearHead",
    "Mean",
    "Model",
    "Objective",
    "Outputs",
    "SampledTargets",
    "SparseTargets",
    "Teacher",
    "Term",
    "fused",
    "losses",
    "make_train_step",
]

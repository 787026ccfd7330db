"""Adapters: networks of any kind, taken apart into pure functions and arrays.

These are the only files that import flax. Each adapter returns an
:class:`~kdjax.types.Adapted`: the function, its parameters and its state. Adapters also
take shapes for arrays (``nnx.eval_shape``, ``jax.eval_shape``): of a network that is
made on a mesh, by :func:`kdjax.train.make_placed`, the step needs the function alone.
"""

from kdjax.models._outputs import paths
from kdjax.models._remat import remat
from kdjax.models.bare import from_apply
from kdjax.models.linen import from_linen
from kdjax.models.nnx import from_nnx

__all__ = ["from_apply", "from_linen", "from_nnx", "paths", "remat"]

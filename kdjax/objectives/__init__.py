"""What a student is trained for: named terms with weights, added up.

Every factory makes an :class:`~kdjax.types.Objective` of one term; :func:`combine`
joins them. A weight or hyper-parameter is a number or a schedule of the optimizer
step. Terms average over the examples or tokens that count, whatever the batch,
micro-batch or device they are in.

A batch may hold ``"mask"``, boolean, one entry per example ``[B]`` or per value of
the loss; what is false counts nowhere. ``where=`` names another entry, or ``None``.
"""

from kdjax.objectives import projectors
from kdjax.objectives._combine import combine
from kdjax.objectives._features import features
from kdjax.objectives._layer_maps import last_layers, uniform_layers
from kdjax.objectives._logits import hard_labels, monitor, relations, soft_labels

__all__ = [
    "combine",
    "features",
    "hard_labels",
    "last_layers",
    "monitor",
    "projectors",
    "relations",
    "soft_labels",
    "uniform_layers",
]

"""What a student is trained for: named terms with weights, added up.

Every factory makes an :class:`~kdjax.types.Objective` of one term; :func:`combine`
joins them. A weight or hyper-parameter is a number or a schedule of the optimizer
step. Terms average over the examples or tokens that count, whatever the batch,
micro-batch or device they are in.

A batch may hold ``"mask"``, boolean, one entry per example ``[B]`` or per value of
the loss; what is false counts nowhere. ``where=`` names another entry, or ``None``.
"""

from kdjax.objectives import projectors
from kdjax.objectives._attention import attention, self_attention_relation
from kdjax.objectives._combine import combine
from kdjax.objectives._factors import factor_transfer
from kdjax.objectives._features import feature_pairs, features
from kdjax.objectives._generation import masked_generation
from kdjax.objectives._information import variational_information
from kdjax.objectives._layer_maps import last_layers, uniform_layers
from kdjax.objectives._logits import (
    hard_labels,
    mixed_labels,
    monitor,
    soft_labels,
)
from kdjax.objectives._memory import contrastive_memory
from kdjax.objectives._next_token import next_token
from kdjax.objectives._relations import relations
from kdjax.objectives._review import review
from kdjax.objectives._whole_batch import over_whole_batch, split_over

__all__ = [
    "attention",
    "combine",
    "contrastive_memory",
    "factor_transfer",
    "feature_pairs",
    "features",
    "hard_labels",
    "last_layers",
    "masked_generation",
    "mixed_labels",
    "monitor",
    "next_token",
    "over_whole_batch",
    "projectors",
    "relations",
    "review",
    "self_attention_relation",
    "soft_labels",
    "split_over",
    "uniform_layers",
    "variational_information",
]

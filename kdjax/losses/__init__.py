"""Distillation losses: plain functions of arrays, one value per example or token.

Student first, teacher second, the rest by keyword. Nothing is averaged: reduce with
:class:`kdjax.types.Mean`, which takes the mask over examples or tokens. Nothing stops
a gradient: teachers do.
"""

from kdjax.losses._attention import (
    attention_kl,
    attention_mse,
    self_attention_relation,
)
from kdjax.losses._class_relations import (
    inter_class_relation,
    intra_class_relation,
    multi_level_relation,
)
from kdjax.losses._classification import (
    cross_entropy,
    hard_distillation,
    knowledge_distillation,
    weighted_soft_labels,
)
from kdjax.losses._contrast import contrastive, contrastive_representation
from kdjax.losses._decoupled import binary_distillation, decoupled_kd, normalized_kd
from kdjax.losses._kl import (
    adaptive_kl,
    forward_kl,
    interpolated_teacher_kl,
    reverse_kl,
    soft_cross_entropy,
    symmetric_kl,
)
from kdjax.losses._mixtures import jensen_shannon, skew_kl, skew_reverse_kl
from kdjax.losses._powers import alpha_beta, renyi, total_variation
from kdjax.losses._ranking import logistic_ranking, pairwise_hinge
from kdjax.losses._regression import bounded_regression, logit_mse, standardize_logits
from kdjax.losses._relations import relational_angle, relational_distance
from kdjax.losses._scores import margin_mse, score_kl
from kdjax.losses._similarities import (
    correlation_congruence,
    probabilistic_transfer,
    similarity_preserving,
)

__all__ = [
    "adaptive_kl",
    "alpha_beta",
    "attention_kl",
    "attention_mse",
    "binary_distillation",
    "bounded_regression",
    "contrastive",
    "contrastive_representation",
    "correlation_congruence",
    "cross_entropy",
    "decoupled_kd",
    "forward_kl",
    "hard_distillation",
    "inter_class_relation",
    "interpolated_teacher_kl",
    "intra_class_relation",
    "jensen_shannon",
    "knowledge_distillation",
    "logistic_ranking",
    "logit_mse",
    "margin_mse",
    "multi_level_relation",
    "normalized_kd",
    "pairwise_hinge",
    "probabilistic_transfer",
    "relational_angle",
    "relational_distance",
    "renyi",
    "reverse_kl",
    "score_kl",
    "self_attention_relation",
    "similarity_preserving",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "standardize_logits",
    "symmetric_kl",
    "total_variation",
    "weighted_soft_labels",
]

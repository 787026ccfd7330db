"""Distillation losses: plain functions of arrays, one value per example or token.

Student first, teacher second, the rest by keyword. Nothing is averaged: reduce with
:class:`kdjax.types.Mean`, which takes the mask over examples or tokens. Nothing stops
a gradient: teachers do.
"""

from kdjax.losses._activations import (
    activation_boundary,
    hierarchical_context,
    margin_relu_mse,
)
from kdjax.losses._attention import (
    attention_kl,
    attention_mse,
    self_attention_relation,
)
from kdjax.losses._channels import (
    channel_similarity,
    feature_correlation,
    solution_flow,
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
from kdjax.losses._features import (
    feature_cosine,
    feature_mse,
    masked_generation,
    variational_information,
)
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
from kdjax.losses._rollouts import (
    k1,
    k2,
    k3,
    policy_distillation,
    sampled_reverse_kl,
)
from kdjax.losses._sampled import sampled_forward_kl, sampled_targets
from kdjax.losses._scores import margin_mse, score_kl
from kdjax.losses._similarities import (
    correlation_congruence,
    linear_cka,
    probabilistic_transfer,
    similarity_preserving,
)
from kdjax.losses._sparse import (
    sparse_forward_kl,
    sparse_reverse_kl,
    top_k_targets,
)
from kdjax.losses._spatial import (
    attention_transfer,
    channel_distribution,
    factor_transfer,
    neuron_selectivity,
)
from kdjax.losses._tokens import UNSCORED, chunk_likelihood, next_token
from kdjax.losses._vocabularies import align_vocabulary, universal_logit

__all__ = [
    "UNSCORED",
    "activation_boundary",
    "adaptive_kl",
    "align_vocabulary",
    "alpha_beta",
    "attention_kl",
    "attention_mse",
    "attention_transfer",
    "binary_distillation",
    "bounded_regression",
    "channel_distribution",
    "channel_similarity",
    "chunk_likelihood",
    "contrastive",
    "contrastive_representation",
    "correlation_congruence",
    "cross_entropy",
    "decoupled_kd",
    "factor_transfer",
    "feature_correlation",
    "feature_cosine",
    "feature_mse",
    "forward_kl",
    "hard_distillation",
    "hierarchical_context",
    "inter_class_relation",
    "interpolated_teacher_kl",
    "intra_class_relation",
    "jensen_shannon",
    "k1",
    "k2",
    "k3",
    "knowledge_distillation",
    "linear_cka",
    "logistic_ranking",
    "logit_mse",
    "margin_mse",
    "margin_relu_mse",
    "masked_generation",
    "multi_level_relation",
    "neuron_selectivity",
    "next_token",
    "normalized_kd",
    "pairwise_hinge",
    "policy_distillation",
    "probabilistic_transfer",
    "relational_angle",
    "relational_distance",
    "renyi",
    "reverse_kl",
    "sampled_forward_kl",
    "sampled_reverse_kl",
    "sampled_targets",
    "score_kl",
    "self_attention_relation",
    "similarity_preserving",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "solution_flow",
    "sparse_forward_kl",
    "sparse_reverse_kl",
    "standardize_logits",
    "symmetric_kl",
    "top_k_targets",
    "total_variation",
    "universal_logit",
    "variational_information",
    "weighted_soft_labels",
]

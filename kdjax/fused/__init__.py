"""Losses over a linear head, whose logits never exist all at once.

A vocabulary of 150000 classes makes logits of 600 kB per token and model. Here they
are multiplied out for some tokens at a time, and gone before the next: values and
gradients are those of the loss over all logits.
"""

from kdjax.fused._token_map import token_map
from kdjax.fused._token_mean import token_mean, token_means
from kdjax.fused._tokens import (
    CHUNK_BYTES,
    LEAST_TOKENS,
    LEAST_TOKENS_ON_CPU,
    TOKEN_AXES,
)

__all__ = [
    "CHUNK_BYTES",
    "LEAST_TOKENS",
    "LEAST_TOKENS_ON_CPU",
    "TOKEN_AXES",
    "token_map",
    "token_mean",
    "token_means",
]

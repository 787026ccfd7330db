"""Losses over a linear head, whose logits never exist all at once.

A vocabulary of 150000 classes makes logits of 600 kB per token and model. Here they
are multiplied out for some tokens at a time, and gone before the next: values and
gradients are those of the loss over all logits.
"""

from kdjax.fused._token_mean import (
    CHUNK_BYTES,
    TOKEN_AXES,
    token_mean,
    token_means,
)

__all__ = ["CHUNK_BYTES", "TOKEN_AXES", "token_mean", "token_means"]

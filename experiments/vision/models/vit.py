"""A small vision transformer with a distillation token."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.vision.models.features import DISTILLATION, outputs
from kdjax import Outputs

_TOKENS = 2  # class and distillation


class Block(nnx.Module):
    """Attention and a dense layer, each normalised before and added to what it read."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, width, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.wide = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.norm1(x))
        return x + self.narrow(nnx.gelu(self.wide(self.norm2(x))))


class VisionTransformer(nnx.Module):
    """Patches, a class token and a distillation token.

    While training, the logits are those of the class token, and the feature
    ``"distillation"`` those of the other; in evaluation the logits are the mean of
    both. A map is the patches' tokens after a third of the blocks, which no ReLU
    follows: before and after it are the same.

    Args:
      width: of a token.
      depth: blocks, a multiple of three.
      heads: of attention.
      patch: height and width of a patch.
      shape: height, width and channels of an image.
      classes: how many there are.
      rngs: of the initial weights.

    Reference:
      Touvron et al., Training data-efficient image transformers and distillation
      through attention, 2020, section 4. arXiv:2012.12877
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        shape: tuple[int, int, int],
        classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        height, across, channels = shape
        self.patch = nnx.Conv(
            channels, width, (patch, patch), strides=patch, padding="SAME", rngs=rngs
        )
        patches = -(-height // patch) * -(-across // patch)
        small = nnx.initializers.truncated_normal(0.02)
        self.tokens = nnx.Param(small(rngs.params(), (1, _TOKENS, width)))
        self.positions = nnx.Param(small(rngs.params(), (1, _TOKENS + patches, width)))
        self.blocks = nnx.List(Block(width, heads, rngs=rngs) for _ in range(depth))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)
        self.distillation_head = nnx.Linear(width, classes, rngs=rngs)
        self.evaluates = False

    def set_view(self, deterministic: bool | None = None, **others: object) -> dict:
        """Called by ``nnx.view``, which tells training from evaluation.

        Args:
          deterministic: whether the network is evaluated.
          **others: meant for other modules.
        """
        if deterministic is not None:
            self.evaluates = deterministic
        return others

    def __call__(self, x: Array) -> Outputs:
        x = self.patch(x)
        size = x.shape[1:3]
        tokens = jnp.broadcast_to(self.tokens[...], (len(x), *self.tokens.shape[1:]))
        x = jnp.concatenate([tokens, x.reshape(len(x), -1, x.shape[-1])], 1)
        x = x + self.positions[...]
        maps = []
        for index, block in enumerate(self.blocks, start=1):
            x = block(x)
            if 3 * index % len(self.blocks) == 0:
                maps.append(x[:, _TOKENS:].reshape(len(x), *size, -1))
        x = self.norm(x[:, :_TOKENS])
        logits, other = self.head(x[:, 0]), self.distillation_head(x[:, 1])
        shown = (logits + other) / 2 if self.evaluates else logits
        return outputs(shown, x[:, 0], maps, maps, **{DISTILLATION: other})

"""A decoder like Llama and Qwen, in one file."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.lm.placement import by_examples
from experiments.lm.rotary import RopeScaling, Rotation, frequencies
from kdjax import LinearHead
from kdjax.types import PyTree

_POSITIVE = (
    "vocabulary", "layers", "width", "heads", "key_value_heads", "head_width",
    "mlp_width", "rope_theta", "norm_epsilon", "unroll",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder."""

    vocabulary: int
    """Tokens there are."""
    layers: int
    """Blocks, one after the other."""
    width: int
    """Of a hidden state."""
    heads: int
    """Of attention."""
    key_value_heads: int
    """Heads of keys and values, each shared by ``heads / key_value_heads`` queries."""
    head_width: int
    """Of a query, key or value; even."""
    mlp_width: int
    """Inside the SwiGLU layer."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """As in Llama 3.1 and later."""
    norm_epsilon: float = 1e-6
    """Added to a mean square before its root is taken."""
    tied: bool = False
    """Whether the output projection is the embedding."""
    query_key_norm: bool = False
    """Whether queries and keys are normalised, head by head, as in Qwen 3."""
    attention_bias: bool = False
    """Whether queries, keys and values have a bias, as in Qwen 2."""
    remat: bool = False
    """Whether a block is computed again in the backward pass, to save memory."""
    unroll: int = 1
    """Blocks in one turn of the scan: more take longer to compile, and run faster."""
    dtype: str = "float32"
    """Of what is computed; parameters stay as they are."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}; expected more than 0."
                )
        if self.heads % self.key_value_heads:
            raise ValueError(
                f"key_value_heads: got {self.key_value_heads} for {self.heads} heads; "
                "expected a divisor, since every key serves as many queries."
            )
        if self.head_width % 2:
            raise ValueError(
                f"head_width: got {self.head_width}; expected an even number, since "
                "rotary positions turn pairs."
            )
        if not jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating):
            raise ValueError(f"dtype: got {self.dtype!r}; expected a floating one.")


class Cache(NamedTuple):
    """Keys and values of the tokens so far in one layer, in the slots of their places.

    A later token only attends to slots up to its own position, so that whatever is in
    those beyond, of padding say, is never seen, and is overwritten in its turn.

    Attributes:
      keys: already turned, ``[B, key_value_heads, slots, head_width]``.
      values: equal in shape.
    """

    keys: Array
    values: Array

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, slots: int) -> tuple[Cache, ...]:
        """Room for ``slots`` tokens of each of ``batch`` texts, in every layer."""
        shape = batch, config.key_value_heads, slots, config.head_width
        zeros = jnp.zeros(shape, config.dtype)
        return (cls(zeros, zeros),) * config.layers

    def extended(self, keys: Array, values: Array, first: Array) -> Cache:
        """With those ``[B, T, heads, D]`` of more tokens, from slot ``first [B]``."""

        def write(slots: Array, new: Array, first: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(slots, new, first, axis=1)

        pairs = zip(self, (keys, values), strict=True)
        return Cache(
            *(jax.vmap(write)(slots, new.swapaxes(1, 2), first) for slots, new in pairs)
        )


Kept = TypeVar("Kept", Cache, None)
"""What a layer takes and gives back: its cache, or ``None`` where none is kept."""


class Places(NamedTuple):
    """Where tokens stand, and so what each of them attends to.

    Attributes:
      rotation: of their queries and keys.
      mask: which keys a query sees, ``[1 or B, 1, T, S]``.
      first: position of the first token of each text, ``[B]``.
    """

    rotation: Rotation
    mask: Array
    first: Array


class Attention(nnx.Module):
    """Causal attention whose keys and values serve several queries each.

    Features: ``query``, ``key`` and ``value`` before they are normalised and turned;
    ``scores``, what the softmax takes.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        dense = functools.partial(nnx.LinearGeneral, dtype=config.dtype, rngs=rngs)
        norm = functools.partial(_norm, config.head_width, config, rngs=rngs)
        bias, head = config.attention_bias, config.head_width
        shared = config.key_value_heads, head
        self.query = dense(config.width, (config.heads, head), use_bias=bias)
        self.key = dense(config.width, shared, use_bias=bias)
        self.value = dense(config.width, shared, use_bias=bias)
        self.query_norm = norm() if config.query_key_norm else None
        self.key_norm = norm() if config.query_key_norm else None
        self.out = dense(
            (config.heads, head), config.width, axis=(-2, -1), use_bias=False
        )

    def scores(self, query: Array, key: Array, mask: Array) -> Array:
        """Scaled products ``[B, heads, T, S]`` in float32, -inf where masked."""
        key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
        scaled = query / math.sqrt(query.shape[-1])
        products = jnp.einsum(
            "bthd,bshd->bhts", scaled, key, preferred_element_type=jnp.float32
        )
        return jnp.where(mask, products, -jnp.inf)

    def __call__(self, x: Array, places: Places, cache: Kept) -> tuple[Array, Kept]:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = places.rotation(query), places.rotation(key)
        if cache is not None:
            cache = cache.extended(key, value, places.first)
            key, value = (slots.swapaxes(1, 2) for slots in cache)
        # For whom asks for the feature; compiled for nobody else.
        self.scores(query, key, places.mask)
        mixed = jax.nn.dot_product_attention(query, key, value, mask=places.mask)
        return self.out(mixed), cache


class SwiGLU(nnx.Module):
    """A dense layer, gated.

    Reference:
      Shazeer, GLU Variants Improve Transformer, 2020, equation 6. arXiv:2002.05202
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        dense = functools.partial(
            nnx.Linear, use_bias=False, dtype=config.dtype, rngs=rngs
        )
        self.gate = dense(config.width, config.mlp_width)
        self.up = dense(config.width, config.mlp_width)
        self.down = dense(config.mlp_width, config.width)

    def __call__(self, x: Array) -> Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and a dense layer, each normalised before and added to what it read."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config.width, config, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config.width, config, rngs=rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x: Array, places: Places, cache: Kept) -> tuple[Array, Kept]:
        mixed, cache = self.attention(self.attention_norm(x), places, cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


def _norm(width: int, config: DecoderConfig, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Takes the mean square in float32, whatever the dtype."""
    return nnx.RMSNorm(
        width, epsilon=config.norm_epsilon, dtype=config.dtype, rngs=rngs
    )


class Decoder(nnx.Module):
    """Reads tokens and tells the next one's logits, as a head not multiplied out.

    The parameters of all layers are stacked, and one compiled block runs over them.
    Features are ``"blocks[2]"``, the third layer's hidden state, or
    ``"blocks[2]/attention/query"``.

    Args:
      config: its shape.
      rngs: of the initial weights.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Embed(
            config.vocabulary, config.width, dtype=config.dtype, rngs=rngs
        )
        made = nnx.vmap(lambda rngs: Block(config, rngs=rngs))
        self.blocks = nnx.split_rngs(splits=config.layers)(made)(rngs)
        self.norm = _norm(config.width, config, rngs=rngs)
        if not config.tied:
            initial = nnx.initializers.lecun_normal()
            shape = config.width, config.vocabulary
            self.head = nnx.Param(initial(rngs.params(), shape))

    def __call__(
        self,
        tokens: Array,
        segments: Array | None = None,
        positions: Array | None = None,
    ) -> LinearHead:
        """Reads whole texts.

        Args:
          tokens: ``[B, T]``. Padding behind a text changes nothing before it.
          segments: which text of a packed row a token is of, ``[B, T]`` integers; it
            attends to that text alone. Padding is a segment of its own. ``None``
            takes a row for one text.
          positions: of the tokens in their texts, ``[B, T]``; by default counted from
            the first of each segment.

        Returns:
          The logits' two factors, ``hidden [B, T, width]`` and ``kernel
          [width, vocabulary]``.
        """
        _check_tokens(tokens, segments=segments, positions=positions)
        index = jnp.arange(tokens.shape[1])
        mask = (index[:, None] >= index)[None, None]
        if segments is not None:
            mask &= (segments[:, :, None] == segments[:, None, :])[:, None]
        if positions is None:
            positions = index[None] if segments is None else _counted(segments)
        places = Places(self._rotation(positions), mask, positions[:, 0])

        def layer(x: Array, block: Block) -> Array:
            return by_examples(block(x, places, None)[0])

        if self.config.remat:
            layer = nnx.remat(layer)
        scanned = nnx.scan(
            layer,
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
            unroll=self.config.unroll,
        )
        return self._head(scanned(by_examples(self.embedding(tokens)), self.blocks))

    def decode(
        self, tokens: Array, first: Array, caches: Sequence[Cache]
    ) -> tuple[LinearHead, tuple[Cache, ...]]:
        """Goes on with texts whose keys and values were kept.

        Args:
          tokens: the next ones of each text, ``[B, T]``.
          first: position of the first of them, ``[B]``; ``first + T`` is at most the
            number of slots.
          caches: of all tokens before, one for each layer.

        Returns:
          The logits' two factors as in a call, and the caches with these tokens.
        """
        _check_tokens(tokens)
        positions = first[:, None] + jnp.arange(tokens.shape[1])
        slots = jnp.arange(caches[0].keys.shape[2])
        mask = (positions[..., None] >= slots)[:, None]
        places = Places(self._rotation(positions), mask, first)
        # One by one: what a scan over layers carries is copied for every token, and
        # these caches are written in place (jax 0.10.2).
        graph, params = nnx.split(self.blocks)
        x, extended = self.embedding(tokens), list(caches)
        for index, cache in enumerate(caches):
            block = nnx.merge(graph, jax.tree.map(operator.itemgetter(index), params))
            x, extended[index] = block(x, places, cache)
        return self._head(x), tuple(extended)

    def _rotation(self, positions: Array) -> Rotation:
        config = self.config
        turns = frequencies(config.head_width, config.rope_theta, config.rope_scaling)
        return Rotation.of(positions, turns)

    def _head(self, x: Array) -> LinearHead:
        tied = self.config.tied
        kernel = self.embedding.embedding[...].T if tied else self.head[...]
        return LinearHead(self.norm(x), kernel.astype(self.config.dtype))


def _check_tokens(tokens: Array, **others: Array | None) -> None:
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens: got {tokens.dtype}; expected integers.")
    if tokens.ndim != 2:
        raise ValueError(f"tokens: got shape {tokens.shape}; expected [B, T].")
    for name, other in others.items():
        if other is not None and other.shape != tokens.shape:
            raise ValueError(
                f"{name}: got shape {other.shape} for tokens {tokens.shape}; expected "
                "one entry per token."
            )


def _counted(segments: Array) -> Array:
    """Positions ``[B, T]`` that start at 0 with every segment."""
    index = jnp.arange(segments.shape[1])
    first = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


@functools.cache
def _graph(config: DecoderConfig) -> nnx.GraphDef[Decoder]:
    return nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def with_params(config: DecoderConfig, params: PyTree) -> Decoder:
    """The decoder that has these parameters, a tree as :func:`from_nnx` gives it."""
    return nnx.merge(_graph(config), params)


def from_layers(
    config: DecoderConfig, params: PyTree, layers: Sequence[int]
) -> tuple[DecoderConfig, PyTree]:
    """A student of some of a teacher's layers, and all else that the teacher has.

    Args:
      config: the teacher's.
      params: the teacher's; the student's are copies.
      layers: which ones, in the student's order, such as ``[0, 3, 6, 9]``; -1 is the
        last.

    Returns:
      The student's config and parameters.

    Raises:
      ValueError: ``layers`` is empty, or the teacher lacks one of them.

    Reference:
      Sanh, Debut, Chaumond and Wolf, DistilBERT, a distilled version of BERT, 2019,
      section 3. arXiv:1910.01108
    """
    if not layers:
        raise ValueError("layers: got none; expected indices of the teacher's layers.")
    beyond = [each for each in layers if not -config.layers <= each < config.layers]
    if beyond:
        raise ValueError(
            f"layers: got {beyond}, but the teacher has layers 0 to "
            f"{config.layers - 1}."
        )
    taken = jnp.asarray([each % config.layers for each in layers])
    student = jax.tree.map(jnp.copy, params)
    student["blocks"] = jax.tree.map(lambda stack: stack[taken], params["blocks"])
    return dataclasses.replace(config, layers=len(layers)), student

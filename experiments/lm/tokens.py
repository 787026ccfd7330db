"""Text to tokens and back: characters, bytes, or pairs of bytes learnt from a text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from etils.epath import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kdjax.io.files import write_whole

Kind: TypeAlias = Literal["characters", "bytes", "bpe"]
"""What tokens stand for."""

START = "<|endoftext|>"
"""Before the first token of every text, so that this one too is predicted."""

_STARTS = (START, "<|begin_of_text|>", "<s>")


class Tokens:
    """A tokenizer that knows which bytes each of its tokens stands for.

    Args:
      tokenizer: whose tokens are pieces of the text, and nothing but that: it changes
        no text.
    """

    def __init__(self, tokenizer: Tokenizer):
        # What looks like a special token in a text is text.
        tokenizer.encode_special_tokens = True
        # Texts are whole here, and rows are cut of them elsewhere.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        by_token = tokenizer.get_vocab(with_added_tokens=True)
        self.size = 1 + max(by_token.values())
        """Of the vocabulary."""
        self.bytes: list[bytes] = [b""] * self.size
        """What each token stands for; nothing, if it is a special one."""
        of_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        added = tokenizer.get_added_tokens_decoder()
        for token, index in by_token.items():
            if index not in added:
                self.bytes[index] = _bytes(token) if of_byte_level else token.encode()
            elif not added[index].special:
                self.bytes[index] = token.encode()
        starts = [by_token[name] for name in _STARTS if name in by_token]
        if not starts:
            raise ValueError(
                f"tokenizer: has none of {', '.join(_STARTS)}; expected one, which "
                "stands before every text."
            )
        self.start: int = starts[0]
        """The token before every text."""

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, int32 ``[N]``, without one before it.

        Raises:
          ValueError: it has what no token stands for, or the tokenizer changes it.
        """
        # As a whole: where lines end, tokenizers of others have tokens of their own.
        (whole,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        decoded = self.decode(whole.ids)
        if decoded != text:
            raise _changed(text, decoded)
        return np.array(whole.ids, np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; a part of a character is shown as �.

        A model may have more tokens than its tokenizer; the others have no text.
        """
        joined = b"".join(self.bytes[token] for token in tokens if token < self.size)
        return joined.decode(errors="replace")

    @property
    def has_pairs(self) -> bool:
        """Whether a token may stand for several characters."""
        return any(len(each.decode(errors="ignore")) > 1 for each in self.bytes)

    def lengths(self, tokens: np.ndarray) -> np.ndarray:
        """How many bytes each token stands for, integers in the shape of tokens."""
        return np.array([len(each) for each in self.bytes], np.int32)[tokens]

    def write(self, path: Path) -> None:
        """Into a file of the ``tokenizers`` package."""
        write_whole(path, self._tokenizer.to_str(pretty=True))

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """From such a file.

        Raises:
          OSError: it cannot be read.
          ValueError: it is none.
        """
        content = path.read_text(encoding="utf-8")
        try:
            return cls(Tokenizer.from_str(content))
        except Exception as error:  # The package raises nothing narrower.
            raise ValueError(
                f"{path}: {error}; expected a file of the tokenizers package."
            ) from error


def make(kind: Kind, train: Sequence[str], alphabet: str, size: int) -> Tokens:
    """Makes a tokenizer.

    Args:
      kind: ``"characters"``, ``"bytes"``, or ``"bpe"``, byte pairs as in GPT-2.
      train: texts that byte pairs are learnt from.
      alphabet: every character that there may be, for characters.
      size: most tokens, for byte pairs; at least 257.
    """
    known = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "characters":
        known = sorted(set(alphabet))
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
    else:
        vocabulary = {token: index for index, token in enumerate(known)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    if kind != "characters":
        by_bytes = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=kind == "bpe"
        )
        tokenizer.pre_tokenizer = by_bytes
        tokenizer.decoder = decoders.ByteLevel()
    if kind == "bpe":
        # A line has the same tokens wherever it stands.
        by_lines = pre_tokenizers.Split("\n", "merged_with_previous")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_lines, by_bytes])
        trainer = trainers.BpeTrainer(
            vocab_size=size - 1, initial_alphabet=known, show_progress=False
        )
        tokenizer.train_from_iterator(train, trainer)
    tokenizer.add_special_tokens([START])
    return Tokens(tokenizer)


def _changed(text: str, decoded: str) -> ValueError:
    """Why tokens do not stand for the text, by what they stand for."""
    unknown = set(text) - set(decoded)
    if decoded == "".join(each for each in text if each not in unknown):
        return ValueError(
            f"text: has {', '.join(map(repr, sorted(unknown)))}, for which there is no "
            "token; expected text like that which the tokenizer was made for, or bytes."
        )
    pairs = enumerate(itertools.zip_longest(text, decoded))
    place = next(index for index, (ours, theirs) in pairs if ours != theirs)
    end = place + _SHOWN
    return ValueError(
        f"text: has {text[place:end]!a} at character {place}, of which this tokenizer "
        f"makes {decoded[place:end]!a}; expected a tokenizer that changes no text, "
        "such as byte pairs without a normalizer."
    )


_SHOWN = 20


def _bytes(token: str) -> bytes:
    """What a token of byte pairs stands for; it has one character for each byte."""
    return bytes(map(_BYTES.__getitem__, token))


def _byte_characters() -> dict[str, int]:
    """GPT-2's: printable bytes are themselves, the others come after 255 in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    moved = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | moved


_BYTES = _byte_characters()

"""A text in three parts, and passages of it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.lm.sources import Document

SHORTEST = 1000
"""Characters that a text must have."""


_FIFTIETH = 50
"""The part of what is not the test part that validates."""


class Texts(NamedTuple):
    """Documents in three parts.

    Attributes:
      train: what models learn from, one text per document.
      validation: what curves are drawn of.
      test: what the table reports.
      fingerprint: a text that differs where the documents do.
    """

    train: list[str]
    validation: list[str]
    test: list[str]
    fingerprint: str


def split(documents: Sequence[Document]) -> Texts:
    """Sets whole documents apart for the test, and the end of the others to validate.

    The test part are the last documents that together have a tenth of all characters:
    of the novels the last one, Persuasion. The validation part is the last fiftieth of
    the characters before. A single document is cut where its last tenth begins.

    Raises:
      ValueError: there is too little text.
    """
    checksum = zlib.crc32(repr(list(documents)).encode())
    texts = [document.text for document in documents]
    total = sum(map(len, texts))
    if total < SHORTEST:
        raise ValueError(
            f"--text: got {total} characters; expected at least {SHORTEST}."
        )
    if len(texts) == 1:
        cut = total - total // 10
        texts = [texts[0][:cut], texts[0][cut:]]
    test: list[str] = []
    while len(texts) > 1 and sum(map(len, test)) < total // 10:
        test.insert(0, texts.pop())
    left = sum(map(len, texts))
    if left < _FIFTIETH:
        raise ValueError(
            f"--text: got {left} characters without the last documents, which are the "
            f"test part; expected at least {_FIFTIETH}, so that the validation part "
            "has one."
        )
    train, validation = _without_end(texts, left // _FIFTIETH)
    return Texts(train, validation, test, f"texts {checksum:08x}")


def _without_end(texts: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Texts without their last characters, and those."""
    kept, end = list(texts), list[str]()
    while count:
        last = kept.pop()
        cut = max(0, len(last) - count)
        end.insert(0, last[cut:])
        count -= len(last) - cut
        if cut:
            kept.append(last[:cut])
    return kept, end


def passage(texts: Sequence[str], characters: int, seed: int) -> list[str]:
    """A part of the training text, at a place drawn by the seed.

    Args:
      texts: in their order.
      characters: how many; 0 for all.
      seed: of the draw.

    Returns:
      The pieces of the documents that the passage goes over.
    """
    total = sum(map(len, texts))
    if not characters or characters >= total:
        return list(texts)
    start = int(np.random.default_rng(seed).integers(total - characters + 1))
    rest, _ = _without_end(texts, total - start - characters)
    _, piece = _without_end(rest, characters)
    return piece

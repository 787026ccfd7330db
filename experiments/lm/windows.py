"""Tokens in rows of equal length: packed to learn from, overlapping to be scored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.lm.tokens import Tokens
from kdjax.io.alignment import align_chunks
from kdjax.io.input import HostBatch


def packed(texts: Sequence[np.ndarray], start: int, length: int) -> HostBatch:
    """Cuts texts, one behind the other, into rows to learn from.

    Every token but the first of each text is predicted: a row begins with the token
    that the row before ends with. The last row reaches back, so that it is full.

    Args:
      texts: tokens of each, ``[N]``.
      start: the token that is put before each.
      length: of a row, in tokens.

    Returns:
      ``tokens`` and ``segments``, int32 ``[rows, length]``: which text, from 1.

    Raises:
      ValueError: the texts are shorter than a row.
    """
    tokens, segments = _joined(texts, start)
    rows = _rows(len(tokens), length)
    return {"tokens": tokens[rows], "segments": segments[rows]}


def _joined(texts: Sequence[np.ndarray], start: int) -> tuple[np.ndarray, np.ndarray]:
    """One text behind the other, and which one each token is of."""
    tokens = np.concatenate([np.append(np.int32(start), text) for text in texts])
    sizes = [len(text) + 1 for text in texts]
    return tokens, np.repeat(np.arange(1, len(texts) + 1, dtype=np.int32), sizes)


def _rows(count: int, length: int) -> np.ndarray:
    """The places of the tokens of each row, ``[rows, length]``."""
    last = count - length
    if last < 0:
        raise ValueError(
            f"--context: got {length} for a text of {count} tokens; expected at most "
            "as many, or more text."
        )
    starts = np.append(np.arange(0, last, length - 1), last)
    return starts[:, None] + np.arange(length)


def overlapping(texts: Sequence[np.ndarray], start: int, length: int) -> HostBatch:
    """Cuts texts into rows in which every token of them is scored once.

    A row repeats the last quarter of the row before, so that what is scored in it has
    at least so much before it; only the first row of a text has less.

    Args:
      texts: as for :func:`packed`.
      start: likewise; it is not scored.
      length: likewise, at least 2.

    Returns:
      ``tokens`` and ``segments``, int32 ``[rows, length]``, and ``scored``, boolean:
      which tokens are predicted, from those before them in the row. A text that is
      shorter than a row is filled up with segment 0.
    """
    tokens, segments, scored = [], [], []
    repeated = max(1, length // 4)
    for text in texts:
        stream = np.append(np.int32(start), text)
        done = 1  # what stands before the text
        while done < len(stream):
            first = 0 if done == 1 else min(done - repeated, len(stream) - length)
            row = stream[first : first + length]
            padding = (0, length - len(row))
            index = np.arange(first, first + length)
            tokens.append(np.pad(row, padding, constant_values=start))
            segments.append(np.pad(np.ones_like(row), padding))
            scored.append((index >= done) & (index < len(stream)))
            done = first + len(row)
    return {
        "tokens": np.stack(tokens),
        "segments": np.stack(segments),
        "scored": np.stack(scored),
    }


def paired(
    texts: Sequence[str], own: Tokens, teacher: Tokens, length: int
) -> HostBatch:
    """Rows of one tokenizer, each beside the same text in the tokens of another.

    Args:
      texts: the texts themselves.
      own: whose tokens are packed.
      teacher: whose tokens stand beside them.
      length: about how many tokens of the teacher a row has.

    Returns:
      What :func:`packed` gives; ``teacher_tokens`` and ``teacher_segments``, filled up
      with segment 0; ``read``, int32 ``[rows, own length]``: the teacher's position
      where it has read as much as at each token, and no more; ``aligned``, boolean:
      whether just as much; ``chunks`` and ``teacher_chunks``, int32: the stretch of
      text that a token is of, whole on both sides, -1 for none.

    Raises:
      ValueError: the texts are shorter than a row.
    """
    ours = [own.encode(text) for text in texts]
    theirs = [teacher.encode(text) for text in texts]
    tokens, segments = _joined(ours, own.start)
    others, other_segments = _joined(theirs, teacher.start)
    rows = _rows(len(tokens), max(2, round(length * len(tokens) / len(others))))
    # Up to the end of each token; what stands before a text counts as a byte.
    read, other_read = (
        np.cumsum(np.maximum(each.lengths(stream), 1))
        for each, stream in ((own, tokens), (teacher, others))
    )
    before = np.append(0, read)[rows[:, 0]]
    first = np.searchsorted(other_read, before, side="right")
    place = np.searchsorted(other_read, read[rows], side="right") - 1
    counts = place[:, -1] - first + 1
    columns = first[:, None] + np.arange(counts.max())
    inside = np.arange(counts.max()) < counts[:, None]
    columns = np.minimum(columns, len(others) - 1)
    chunks = _chunks(
        np.where(tokens[rows] == own.start, -1, read[rows]),
        np.where(inside & (others[columns] != teacher.start), other_read[columns], -1),
    )
    return {
        "tokens": tokens[rows],
        "segments": segments[rows],
        "teacher_tokens": others[columns],
        "teacher_segments": np.where(inside, other_segments[columns], 0),
        "read": np.maximum(place - first[:, None], 0).astype(np.int32),
        "aligned": (other_read[place] == read[rows]) & (place >= first[:, None]),
        "chunks": chunks[0],
        "teacher_chunks": chunks[1],
    }


def _chunks(ends: np.ndarray, other_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The common stretches of each row, without the one that it begins with."""
    pairs = [align_chunks(*row) for row in zip(ends, other_ends, strict=True)]
    sides = [np.stack(side) for side in zip(*pairs, strict=True)]
    # Nothing is before the first token of a row to predict it from.
    first = np.maximum(sides[0][:, :1], 0)
    ours, theirs = (np.where(side == first, -1, side) for side in sides)
    return ours, theirs

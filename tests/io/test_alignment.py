"""Chunks are the shortest stretches that are whole tokens on both sides."""

import numpy as np
import pytest

from kdjax.io.alignment import align_chunks


def test_chunks_end_where_both_do():
    student, teacher = align_chunks([3, 4, 8, 9, 12], [3, 5, 8, 12])
    np.testing.assert_array_equal(student, [0, 1, 1, 2, 2])
    np.testing.assert_array_equal(teacher, [0, 1, 1, 2])
    assert student.dtype == teacher.dtype == np.int32


def test_one_tokenization_is_its_own_alignment():
    ends = [2, 3, 7]
    for chunks in align_chunks(ends, ends):
        np.testing.assert_array_equal(chunks, [0, 1, 2])


def test_special_tokens_and_a_side_that_is_cut_short():
    student, teacher = align_chunks([-1, 3, 6, 9, 12, -1], [-1, 3, 5, 6, 8])
    np.testing.assert_array_equal(student, [-1, 0, 1, -1, -1, -1])
    np.testing.assert_array_equal(teacher, [-1, 0, 1, 1, -1])


def test_tokens_within_one_character_stay_together():
    # Three byte tokens of one character all end behind it.
    student, teacher = align_chunks([1, 2, 2, 2, 3], [1, 2, 3])
    np.testing.assert_array_equal(student, [0, 1, 1, 1, 2])
    np.testing.assert_array_equal(teacher, [0, 1, 2])


def test_nothing_in_common():
    for chunks in align_chunks([2, 4], [3, 5]):
        np.testing.assert_array_equal(chunks, [-1, -1])
    student, teacher = align_chunks([], [3])
    assert (student.shape, teacher.tolist()) == ((0,), [-1])


def test_every_text_that_is_cut_at_random_lines_up():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ends = [np.unique([*rng.integers(1, 40, n), 40]) for n in (12, 8)]
        ids = align_chunks(*ends)
        last = [
            {int(each[chunks == chunk].max()) for chunk in np.unique(chunks)}
            for each, chunks in zip(ends, ids, strict=True)
        ]
        # Chunks end at the same places, which are all that there are.
        assert last[0] == last[1] == set(ends[0].tolist()) & set(ends[1].tolist())


def test_refuses_what_are_no_ends():
    with pytest.raises(ValueError, match="student_ends: got 2 after 3"):
        align_chunks([3, -1, 2], [3])
    with pytest.raises(ValueError, match=r"teacher_ends: got shape \(1, 2\)"):
        align_chunks([3], [[1, 2]])
    with pytest.raises(TypeError, match="student_ends: got dtype float64"):
        align_chunks([1.0], [1])

"""Layer maps: every student layer once, in order, ending together."""

import pytest

from kdjax.objectives import last_layers, uniform_layers


@pytest.mark.parametrize("make", [uniform_layers, last_layers])
@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (3, 12), (5, 12), (7, 7)])
def test_every_student_layer_has_one_of_its_own(make, student, teacher):
    pairs = make(student, teacher)
    ours, theirs = zip(*pairs, strict=True)
    assert list(ours) == list(range(student))
    assert sorted(set(theirs)) == list(theirs)
    assert pairs[-1] == (student - 1, teacher - 1)
    assert theirs[0] >= 0


def test_uniform_spreads_and_last_does_not():
    assert uniform_layers(4, 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]
    assert last_layers(4, 12) == [(0, 8), (1, 9), (2, 10), (3, 11)]


@pytest.mark.parametrize("make", [uniform_layers, last_layers])
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (0, 3, "student_layers: got 0"),
        (2, 0, "teacher_layers: got 0"),
        (4, 3, "student_layers: got 4, more than the teacher's 3"),
    ],
)
def test_refuses_what_cannot_be_mapped(make, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        make(student, teacher)

"""Methods beside each other, one of which may diverge."""

import io

import pytest
from rich.console import Console

from experiments.jobs import comparison
from experiments.jobs.interruption import Sigterm


def trained(pending, diverging):
    """What is done for each method, and what is told of those that diverge."""
    done = []

    def work_of(name):
        def train_seed(seed):
            if (name, seed) in diverging:
                raise FloatingPointError("step 5: the gradient not finite")
            done.append((name, seed))

        return train_seed, lambda: done.append((name, "timed"))

    console = Console(file=io.StringIO())
    with Sigterm() as sigterm:
        told = comparison.train(pending, "alone", work_of, console, sigterm)
    return done, told


def test_a_method_that_diverges_leaves_the_others():
    pending = {"alone": [0], "wild": [0, 1, 2], "tame": [1]}
    done, told = trained(pending, {("wild", 1)})
    assert done == [
        ("alone", 0),
        ("alone", "timed"),
        ("wild", 0),
        ("tame", 1),
        ("tame", "timed"),
    ]
    assert told == {
        "wild": "wild diverged with seed 1: step 5: the gradient not finite"
    }
    with pytest.raises(FloatingPointError, match=r"wild diverged.*leave them out"):
        comparison.refuse(told)


def test_without_a_baseline_nothing_is_compared():
    with pytest.raises(FloatingPointError, match="alone diverged with seed 1: step 5"):
        trained({"alone": [0, 1], "tame": [0]}, {("alone", 1)})


def test_nothing_diverged_nothing_is_refused():
    done, told = trained({"tame": []}, set())
    assert (done, told) == ([("tame", "timed")], {})
    comparison.refuse(told)

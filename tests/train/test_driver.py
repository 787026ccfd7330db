"""The loop around a placed step does not wait, nor move what nobody asked it to."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdjax import models
from kdjax.train import fit, make_mesh, place, place_step
from tests.train import setups
from tests.train.recorders import Numbers, Recorder

STEPS, STEADY = 9, 3


class Guarded(Numbers):
    """Batches of a training; from the third on, what is implicit is refused."""

    def __init__(self, guards):
        super().__init__()
        self.guards = guards

    def __next__(self):
        super().__next__()
        if self.position == STEADY:
            for guard in self.guards:
                guard()
        return setups.batch(self.position)


def test_the_steady_state_moves_nothing_but_batches(monkeypatch):
    state, frozen, step = setups.training(models.from_nnx(setups.Mlp(rngs=nnx.Rngs(0))))
    mesh = make_mesh()
    placed = place_step(step, mesh, state=state, frozen=frozen)
    state, frozen = place(state, mesh), place(frozen, mesh)
    recorder = Recorder()
    kind = type(state.step)

    def refused(self, *args):
        raise AssertionError("a number was asked of an array, which waits for it")

    def numbers():
        # Memory of the host is a CPU device's own: no guard sees it being read.
        for name in ("__bool__", "__float__", "__int__", "__index__", "item", "tolist"):
            monkeypatch.setattr(kind, name, refused)

    with contextlib.ExitStack() as stack:

        def transfers():
            stack.enter_context(jax.transfer_guard("disallow"))

        batches = Guarded([transfers, numbers])
        result = fit(
            placed, state, frozen, batches, steps=STEPS, log_every=2, writers=[recorder]
        )
        # Both guards were there.
        with pytest.raises(Exception, match=r"Disallowed .* transfer"):
            jax.jit(jnp.sin)(np.ones(3))
        with pytest.raises(AssertionError, match="waits for it"):
            float(result.state.step)
    assert result.step == STEPS
    assert sorted(recorder.of("train")) == [2, 4, 6, 8, 9]

"""The README's code runs as it is written."""

import re
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from kdjax.models import from_nnx
from kdjax.types import Objective

README = Path(__file__).parents[1] / "README.md"


class Net(nnx.Module):
    """Has the two features that the README's objective asks for."""

    def __init__(self):
        self.stage3 = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        self.pool = nnx.Linear(4, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.pool(self.stage3(x))


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 6
    scope = {"student_logits": jnp.zeros((2, 3)), "teacher_logits": jnp.eye(2, 3)}
    scope |= {"net": Net(), "teacher_net": from_nnx(Net())}
    scope |= {"student_hidden": jnp.ones((4, 2)), "student_kernel": jnp.eye(2, 3)}
    scope |= {"teacher_hidden": jnp.ones((4, 5)), "teacher_kernel": jnp.eye(5, 3)}
    scope["mask"] = jnp.arange(4) < 3
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    assert "stage3" in capsys.readouterr().out
    assert isinstance(scope["objective"], Objective)
    assert scope["optimizer"].init({"student": {}, "objective": {}})
    assert scope["per_token"].shape == (2,)
    assert int(scope["mean"].count) == 3
    assert int(scope["state"].step) == 100
    assert int(scope["sharded"].step) == 1
    assert scope["metrics"]["loss"].value() < 1


def test_the_training_example_fits_fifteen_lines():
    block = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[2]
    assert len([line for line in block.splitlines() if line.strip()]) <= 15


def test_table_names_every_loss():
    from kdjax import losses

    table = README.read_text().split("## The losses\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", table)) & set(losses.__all__)
    assert named == set(losses.__all__)

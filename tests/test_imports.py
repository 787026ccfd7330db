"""What an import costs: each in a fresh process."""

import subprocess
import sys

import pytest

HEAVY = {
    "flax", "grain", "matplotlib", "orbax", "rich", "safetensors", "sklearn",
    "tensorboardX", "tyro",
}  # fmt: skip


@pytest.mark.parametrize("module", ["kdjax.losses", "kdjax"])
def test_import_loads_nothing_heavy(module):
    code = (
        f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert HEAVY.isdisjoint(run.stdout.split())


def test_no_module_starts_a_backend():
    """`jax.distributed.initialize` must still be possible after every import."""
    code = """
import importlib, pkgutil, jax, kdjax
for module in pkgutil.walk_packages(kdjax.__path__, "kdjax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
jax.config.update("jax_num_cpu_devices", 3)  # refused once there is a backend
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr

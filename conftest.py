"""Eight CPU devices and run-time type checks, for the tests and the doctests."""

import os

# Tests describe a mesh of CPU devices, whatever this machine has besides. The
# environment also reaches the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu compiles for a slice that is not there when it is told not to look for one;
# the last name lets several processes do so at once.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# Programs of tests run for milliseconds, and compiling them is most of the time: less
# optimization leaves half of it, and the older generator of code, where there still is
# one, a half of that.
QUICK = "--xla_backend_optimization_level=0"
if "XLA_FLAGS" not in os.environ:
    older = " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = QUICK + older * (jax.__version_info__ < (0, 11))
    # Flags are read once, here. libtpu reads them anew, and refuses what it lacks.
    jax.devices()
    os.environ["XLA_FLAGS"] = QUICK

# Annotations are checked against what each call gets and gives. An int is a float
# here, as it is to every static type checker.
jaxtyping.install_import_hook(
    ["kdjax.losses", "kdjax.fused"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture(autouse=True)
def as_users_see_it(request):
    """Lifts those checks in doctests and in tests with "refuse" in their name.

    They would come before kdjax's own refusals, with an error of their own.
    """
    doctest = isinstance(request.node, pytest.DoctestItem)
    jaxtyping.config.update(
        "jaxtyping_disable", doctest or "refuse" in request.node.name
    )


@pytest.fixture(autouse=True)
def names(doctest_namespace):
    """What doctests use without importing it."""
    doctest_namespace.update(jax=jax, jnp=jnp, np=np, optax=optax)

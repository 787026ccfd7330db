"""Benchmarks of kdjax against the same work written with other libraries."""

import os

# Before jax loads: libtpu then compiles for a slice that is not there, and does not
# look for one; the last name lets several processes do so at once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

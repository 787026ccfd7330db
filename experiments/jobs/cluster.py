"""Many processes that train together: how they find each other and agree."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

# What JAX says where it finds no cluster, and where it has been used already, as in a
# notebook (0.10.2 and 0.12).
_ALONE = (
    "coordinator_address should be defined",
    "must be called before any JAX calls",
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of the job; on Cloud TPU, Slurm and Kubernetes JAX finds them."""

    coordinator_address: str | None = None
    """HOST:PORT at which process 0 listens and all others reach it; None asks the
    cluster."""
    num_processes: int | None = None
    """How many there are; None asks the cluster, and 1 is this one alone, always."""
    process_id: int | None = None
    """Which of them this one is, from 0; None asks the cluster."""
    start_timeout: int = 300
    """Seconds that each waits for the others at the start."""
    heartbeat_timeout: int = 60
    """Seconds after which all end when one has died or has failed alone."""

    def __post_init__(self):
        given = (self.coordinator_address, self.num_processes, self.process_id)
        if None in given and given not in ((None, None, None), (None, 1, None)):
            raise ValueError(
                "--cluster: got "
                f"coordinator-address {given[0]}, num-processes {given[1]} and "
                f"process-id {given[2]}; expected all three, or none of them where "
                "JAX knows the cluster, or --cluster.num-processes 1 alone."
            )
        if self.num_processes is not None and self.num_processes < 1:
            raise _wrong("num-processes", self.num_processes, "at least 1")
        if self.process_id is not None and not (
            0 <= self.process_id < (self.num_processes or 0)
        ):
            raise _wrong(
                "process-id",
                self.process_id,
                f"0 to {(self.num_processes or 0) - 1}, another one for each of the "
                f"{self.num_processes} processes",
            )
        if self.coordinator_address is not None:
            host, _, port = self.coordinator_address.rpartition(":")
            if not (host and port.isdigit() and 0 < int(port) < 2**16):
                raise _wrong(
                    "coordinator-address",
                    self.coordinator_address,
                    "HOST:PORT of process 0, such as 10.0.0.1:8476",
                )
        for option, seconds in (
            ("start-timeout", self.start_timeout),
            ("heartbeat-timeout", self.heartbeat_timeout),
        ):
            if seconds < 2:
                raise _wrong(option, seconds, "at least 2 seconds")

    def join(self) -> None:
        """Starts ``jax.distributed`` unless this process is alone.

        It must be the first that is asked of JAX, which itself ends a process, with a
        message, when others don't come within ``start_timeout``, and within
        ``heartbeat_timeout`` when one of them has died. One that fails alone waits for
        so long for the others to end too, and then takes them down.

        Raises:
          ValueError: what the cluster says is not complete.
          RuntimeError: JAX was used before, or Kubernetes does not answer.
        """
        if self.num_processes == 1 or jax.distributed.is_initialized():
            return
        try:
            jax.distributed.initialize(
                self.coordinator_address,
                self.num_processes,
                self.process_id,
                initialization_timeout=self.start_timeout,
                heartbeat_timeout_seconds=self.heartbeat_timeout,
                shutdown_timeout_seconds=self.heartbeat_timeout,
            )
        except (ValueError, RuntimeError) as error:
            asked_for = self.num_processes is not None
            if asked_for or not any(text in str(error) for text in _ALONE):
                raise


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def agreed(find: Callable[[], T]) -> T:
    """What the first process finds, in all of them; what it refuses, all refuse.

    Files that it writes appear on other hosts late, or not at all.

    Args:
      find: called in the first process; returns what JSON can hold, or raises
        ``ValueError`` or ``OSError``.

    Raises:
      ValueError: ``find`` raised one of them.
    """
    if jax.process_count() == 1:
        return find()
    told: dict[str, Any] = {}
    if is_first():
        try:
            told["found"] = find()
        except (ValueError, OSError) as error:
            told["refused"] = str(error)
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    same = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    told = json.loads(bytes(np.asarray(same, np.uint8)))
    if "refused" in told:
        raise ValueError(told["refused"])
    return told["found"]


def together() -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("together")


def _wrong(option: str, got: object, expected: str) -> ValueError:
    return ValueError(f"--cluster.{option}: got {got}; expected {expected}.")

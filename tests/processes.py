"""Processes of one job on this machine, each with CPU devices of its own."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Processes:
    """Starts them; those that are left when the block ends are killed.

    Args:
      command: what each runs, a module or a script with its options; those of its
        cluster are added.
      count: how many.
      folder: of what they print.
      devices: CPU devices of each.
      heartbeat: seconds after which they notice that one of them died.
      **environment: of each.
    """

    def __init__(
        self, command, count, folder, *, devices=1, heartbeat=20, **environment
    ):
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(ROOT),
        } | environment  # fmt: skip
        address = f"127.0.0.1:{free_port()}"
        self._running, self._printed = [], []
        for number in range(count):
            cluster = {
                "coordinator-address": address,
                "num-processes": count,
                "process-id": number,
                "heartbeat-timeout": heartbeat,
            }
            options = [f"--cluster.{name}={value}" for name, value in cluster.items()]
            self._printed.append(folder / f"process-{number}-of-{count}.txt")
            with self._printed[-1].open("w") as file:
                self._running.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command), *options],
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self._running:
            process.kill()
            process.wait()

    def __getitem__(self, number):
        return self._running[number]

    def printed(self, number):
        """What a process has printed."""
        return self._printed[number].read_text()

    def statuses(self, timeout):
        """How each has ended within so many seconds; ``None`` if it has not."""
        end = time.monotonic() + timeout
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in self._running:
                process.wait(max(0, end - time.monotonic()))
        return [process.poll() for process in self._running]

    def finish(self, timeout=500):
        """Returns when all of them have ended well."""
        statuses = self.statuses(timeout)
        told = "\n".join(self.printed(number) for number in range(len(statuses)))
        assert statuses == [0] * len(statuses), f"{statuses}\n{told}"


def free_port():
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

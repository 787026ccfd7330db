"""SIGTERM for a job of many trainings."""

from __future__ import annotations

import os
import signal
import threading

import jax


class Interrupted(Exception):
    """A SIGTERM came; what is done is on disk."""


class Sigterm:
    """Ends a job of many trainings at a SIGTERM, wherever it is.

    Within a training, ``fit`` handles the signal: it saves and returns. Outside,
    :class:`Interrupted` is raised at once. A signal in the last step of a training
    is no interruption of that, and ``fit`` does not tell: :meth:`check` does.

    Of several processes none may leave the others alone: it is left to JAX's preemption
    service, and all of them stop together in a training, this one or the next.
    """

    def __enter__(self) -> Sigterm:
        self._listens = (
            jax.process_count() == 1
            and threading.current_thread() is threading.main_thread()
        )
        if self._listens:
            self._arrived, self._wakeup = os.pipe()
            for end in (self._arrived, self._wakeup):
                os.set_blocking(end, False)
            # Python writes the number of each signal here, whoever handles it.
            self._other = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            self._previous = signal.signal(signal.SIGTERM, self._interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
            signal.set_wakeup_fd(self._other)
            os.close(self._arrived)
            os.close(self._wakeup)

    def check(self) -> None:
        """Raises :class:`Interrupted` if a SIGTERM has come since the start."""
        if not self._listens:
            return
        try:
            arrived = os.read(self._arrived, 4096)
        except BlockingIOError:
            return
        if signal.SIGTERM in arrived:
            raise Interrupted

    def _interrupt(self, signum: int, frame: object) -> None:
        del signum, frame
        raise Interrupted

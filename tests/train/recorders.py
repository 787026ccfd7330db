"""Stands in for data, checkpoints and writers of the loop, and tells what they got."""

import json

import jax
import jax.numpy as jnp
import numpy as np


class Numbers:
    """Batches ``{'x': [n, n]}`` for n = 1, 2, ...; its position can be set."""

    def __init__(self, length=10**9):
        self.position, self.length = 0, length

    def __iter__(self):
        return self

    def __next__(self):
        if self.position >= self.length:
            raise StopIteration
        self.position += 1
        return {"x": np.full(2, self.position, np.float32)}

    def get_state(self):
        return self.position

    def set_state(self, position):
        self.position = position


class Memory:
    """A checkpoint store in memory that keeps copies, as files would."""

    def __init__(self, events=None):
        self.saved, self.events, self.waits = {}, [] if events is None else events, 0

    def save(self, step, state, batches, progress, metrics):
        self.events.append(("save", step))
        kept = jax.device_get(state), batches.get_state(), json.dumps(progress), metrics
        self.saved[step] = kept

    def restore(self, state, batches):
        if not self.saved:
            return None
        arrays, position, progress, _ = self.saved[max(self.saved)]
        batches.set_state(position)
        return jax.tree.map(jnp.asarray, arrays), json.loads(progress)

    def wait(self):
        self.waits += 1


class Recorder:
    def __init__(self, events=None):
        self.records, self.events = [], [] if events is None else events

    def write(self, step, scalars, kind):
        self.events.append((kind, step))
        self.records.append((step, kind, dict(scalars)))

    def rewind(self, step):
        self.records = [record for record in self.records if record[0] <= step]

    def flush(self):
        self.events.append(("flush", None))

    def of(self, kind):
        return {step: scalars for step, k, scalars in self.records if k == kind}

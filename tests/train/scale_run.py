"""The training of scale.py by processes of a cluster; see test_scale_processes.py."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import tyro

from experiments.jobs.cluster import Cluster, is_first, together
from tests.train import scale


@dataclasses.dataclass(frozen=True)
class Options:
    out: Path
    cases: str
    cluster: Cluster = dataclasses.field(default_factory=Cluster)


def main(options: Options) -> None:
    options.cluster.join()
    for number, (form, axes, dtype) in enumerate(json.loads(options.cases)):
        axis_name = next(iter(axes))
        ran = scale.run(form, axes, dtype=np.dtype(dtype), axis_name=axis_name)
        if is_first():
            named = {"losses": ran.losses}
            for name in ("params", "statistics"):
                for index, array in enumerate(getattr(ran, name)):
                    named[f"{name}.{index}"] = array
            np.savez(options.out / f"{number}.npz", **named)
    together()


if __name__ == "__main__":
    main(tyro.cli(Options))

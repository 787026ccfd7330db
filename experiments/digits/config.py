"""Every setting of the job, with its default."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils.epath import Path

from experiments.jobs.cluster import Cluster
from experiments.jobs.settings import check_counts, check_positive, refuse


@dataclasses.dataclass(frozen=True)
class Config:
    """Distils a convolutional teacher into a small student on handwritten digits.

    Started again, it reads the runs that are finished and goes on with the one that
    was interrupted.
    """

    out: Path = Path("runs/digits")
    """Folder of results and checkpoints; one folder per set of settings."""
    seeds: int = 5
    """Students of every kind; each seed has its own weights and labelled images."""
    teacher: Path | None = None
    """The teacher of an earlier run, OUT/teacher; None trains one."""
    labels_per_class: int = 10
    """Labelled images per class in the setting with few labels."""
    alpha: float = 0.1
    """Weight of the hard-label loss, in [0, 1]; the soft one has 1 - alpha."""
    temperature: float = 4.0
    """Softens the logits of teacher and student in the soft-label loss; above 0."""
    steps: int = 400
    """Optimizer steps of every student."""
    teacher_steps: int = 500
    """Optimizer steps of the teacher."""
    batch_size: int = 64
    """Images per step, over all devices."""
    learning_rate: float = 2e-2
    """Peak of the students' (AdamW, cosine decay to 0); the teacher has 2e-3."""
    evaluate_every: int = 50
    """Steps between two measurements on the validation part."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; the last step always has one."""
    tensorboard: bool = False
    """Also write TensorBoard events, into each run's folder."""
    trace_steps: int = 0
    """Steps of each training to record for XProf and Perfetto; 0 for none."""
    cluster: Cluster = dataclasses.field(default_factory=Cluster)

    def __post_init__(self):
        check_counts(
            self,
            "seeds",
            "labels_per_class",
            "steps",
            "teacher_steps",
            "batch_size",
            "evaluate_every",
            "checkpoint_every",
        )
        check_positive(self, "temperature", "learning_rate")
        if not 0 <= self.alpha <= 1:
            refuse(
                self,
                "alpha",
                "expected a number in [0, 1], the weight of the hard-label loss "
                "(1 - alpha is the soft one's)",
            )

    def settings(self, teacher: str) -> dict[str, Any]:
        """What the numbers of a run depend on, for its checkpoints.

        Args:
          teacher: where the teacher comes from.
        """
        # More seeds, hosts or another folder leave the runs as they are.
        apart = ("out", "seeds", "tensorboard", "trace_steps", "cluster")
        own = dataclasses.asdict(self) | {"teacher": teacher}
        return {name: value for name, value in own.items() if name not in apart}

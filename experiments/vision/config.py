"""Every setting of the job, with its default."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import optax
from etils.epath import Path

from experiments.jobs.cluster import Cluster
from experiments.jobs.settings import check_counts, check_positive, refuse
from experiments.vision.augmentation import Augmentation
from experiments.vision.methods import METHODS, chosen
from experiments.vision.models import maker


@dataclasses.dataclass(frozen=True)
class Config:
    """Distils a teacher into a student by many methods, and compares them.

    Started again, it reads the runs that are finished and goes on with the one that
    was interrupted. More methods and seeds can be added to a folder; the report has
    those that the last command names.
    """

    out: Path = Path("runs/vision")
    """Folder of results and checkpoints; one folder per set of settings."""
    data_dir: Path | None = None
    """Folder of IDX files or of CIFAR's binary files; None looks for Fashion-MNIST."""
    methods: tuple[str, ...] = ("alone", "kd")
    """Names, with spaces or commas between, or all; feature methods also as at+kd."""
    seeds: int = 5
    """Students of every method; each seed has its own weights and labelled images."""
    student: str = "cnn"
    """The student's network: cnn, mlp, vit, resnet20, resnet8x4, wrn_16_2, ..."""
    teacher_model: str = "cnn_large"
    """The teacher's network: cnn_large, resnet56, resnet32x4, wrn_40_2, ..."""
    teacher: Path | None = None
    """The teacher of an earlier run, OUT/teacher; None trains one."""
    labels: int = 2000
    """Labelled training images of each student, as many of each class; 0 for all."""
    unlabelled: bool = False
    """Also show students the training images without labels."""
    epochs: int = 25
    """Passes of every student over its images."""
    teacher_epochs: int = 10
    """Passes of the teacher over all training images."""
    batch_size: int = 64
    """Images per step, over all devices."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum 0.9, or AdamW; both with cosine decay to 0."""
    learning_rate: float = 0.05
    """Peak of the students'."""
    teacher_learning_rate: float = 0.05
    """Peak of the teacher's."""
    weight_decay: float = 5e-4
    """Of students and teacher; at least 0."""
    padding: int = 0
    """Pixels by which crops move an image; 0 for none. CIFAR's usual value is 4."""
    flip: bool = True
    """Mirror half of the images."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution for the students; 0 for none."""
    validation: int = 5000
    """Training images set apart, the same ones always."""
    evaluations: int = 6
    """Measurements on the validation part over a training."""
    checkpoints: int = 2
    """Checkpoints over a training; the last step always has one."""
    tensorboard: bool = False
    """Also write TensorBoard events, into each run's folder."""
    trace_steps: int = 0
    """Steps of each training to record for XProf and Perfetto; 0 for none."""
    cluster: Cluster = dataclasses.field(default_factory=Cluster)

    def __post_init__(self):
        check_counts(
            self,
            "seeds",
            "epochs",
            "teacher_epochs",
            "batch_size",
            "validation",
            "evaluations",
            "checkpoints",
        )
        check_positive(self, "learning_rate", "teacher_learning_rate")
        for name in ("labels", "weight_decay", "padding", "mixup"):
            if not 0 <= getattr(self, name) < math.inf:
                refuse(self, name, "expected a finite number of at least 0")
        for name in ("student", "teacher_model"):
            try:
                maker(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"--{name.replace('_', '-')}: {error}") from error
        if not chosen(self.methods)[1:] and "alone" not in self.methods:
            refuse(self, "methods", f"expected some of {', '.join(METHODS)}")

    def augmentation(self, *, of_student: bool) -> Augmentation:
        """The views; the teacher learns without mixup."""
        return Augmentation(self.padding, self.flip, self.mixup if of_student else 0.0)

    def optimizer_for(self, peak: float, steps: int) -> optax.GradientTransformation:
        """With the schedule of a training."""
        rate = optax.cosine_decay_schedule(peak, steps)
        if self.optimizer == "adamw":
            return optax.adamw(rate, weight_decay=self.weight_decay)
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay),
            optax.sgd(rate, momentum=0.9, nesterov=True),
        )

    def settings(self, teacher: str, images: str) -> dict[str, Any]:
        """What the numbers of a run depend on, for its checkpoints.

        Args:
          teacher: where the teacher comes from.
          images: what they are.
        """
        # More seeds, methods, hosts or another folder leave the runs as they are.
        apart = ("out", "seeds", "methods", "tensorboard", "trace_steps", "cluster")
        own = dataclasses.asdict(self) | {"teacher": teacher, "data_dir": images}
        return {name: value for name, value in own.items() if name not in apart}

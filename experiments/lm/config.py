"""Every setting of the job, with its default."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import optax
from etils.epath import Path

from experiments.jobs.cluster import Cluster
from experiments.jobs.settings import check_counts, check_positive, refuse
from experiments.lm.methods import METHODS, chosen
from experiments.lm.model import DecoderConfig
from experiments.lm.tokens import Kind


@dataclasses.dataclass(frozen=True)
class Config:
    """Distils a language model into a smaller one by many methods, and compares them.

    Started again, it reads the runs that are finished and goes on with the one that
    was interrupted. More methods and seeds can be added to a folder; the report has
    those that the last command names.
    """

    out: Path = Path("runs/lm")
    """Folder of results and checkpoints; one folder per set of settings."""
    corpus: Literal["austen", "bible"] = "austen"
    """Jane Austen's novels or the King James Bible, from Debian's packages."""
    data_dir: Path | None = None
    """Folder into which those packages were unpacked; None looks in / and data."""
    text: Path | None = None
    """A text file, or a folder of *.txt, in place of the corpus."""
    tokenizer: Kind = "characters"
    """Of teacher and students; a loaded teacher brings its own."""
    vocabulary: int = 512
    """Tokens of byte pairs, where there are any."""
    methods: tuple[str, ...] = ("alone", "forward_kl")
    """Names, with spaces or commas between, or all; alone:4 trains 4 times as long."""
    seeds: int = 3
    """Students of every method; each seed has its own weights and passage of text."""
    characters: int = 100_000
    """Of the passage that a student learns from; 0 for all of the training text."""
    steps: int = 600
    """Of every student."""
    batch_size: int = 16
    """Rows per step, over all devices."""
    context: int = 128
    """Tokens of a row."""
    layers: int = 2
    """Of the student."""
    width: int = 64
    """Of the student's hidden states."""
    heads: int = 4
    """Of attention, in student and teacher; divides both widths."""
    teacher: Path | None = None
    """OUT/teacher of an earlier run, or a folder of Llama or Qwen; None trains one."""
    teacher_layers: int = 4
    """Of a teacher that is trained here."""
    teacher_width: int = 128
    """Of its hidden states."""
    teacher_steps: int = 1500
    """On all of the training text."""
    learning_rate: float = 3e-3
    """Peak of the students'; AdamW with a warm-up and cosine decay to 0."""
    teacher_learning_rate: float = 2e-3
    """Peak of the teacher's."""
    weight_decay: float = 0.1
    """Of students and teacher; at least 0."""
    temperature: float = 1.0
    """Of the divergences."""
    own_share: float = 0.5
    """Share of the steps of gkd that learn from the student's own texts."""
    prompt: int = 32
    """Tokens of a row that a text is made to go on from."""
    sampling_temperature: float = 1.0
    """Of the texts that models make to learn from."""
    top_k: int = 0
    """Likewise: the tokens that may be drawn; 0 for all."""
    top_p: float = 1.0
    """Likewise: the share of probability that may be drawn."""
    evaluations: int = 8
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
            "steps",
            "batch_size",
            "layers",
            "width",
            "heads",
            "teacher_layers",
            "teacher_width",
            "teacher_steps",
            "evaluations",
            "checkpoints",
        )
        check_positive(
            self,
            "learning_rate",
            "teacher_learning_rate",
            "temperature",
            "sampling_temperature",
        )
        for name in ("characters", "weight_decay", "top_k"):
            if not 0 <= getattr(self, name) < math.inf:
                refuse(self, name, "expected a finite number of at least 0")
        for name in ("own_share", "top_p"):
            if not 0 < getattr(self, name) <= 1:
                refuse(self, name, "expected a number above 0 and at most 1")
        if self.vocabulary < 300:
            refuse(self, "vocabulary", "expected at least 300: all bytes, and pairs")
        if self.context < 8:
            refuse(self, "context", "expected at least 8")
        if not 0 < self.prompt < self.context:
            refuse(self, "prompt", f"expected 1 to {self.context - 1}, below --context")
        for name in ("width", "teacher_width"):
            if getattr(self, name) % (2 * self.heads):
                refuse(
                    self, name, f"expected a multiple of 2 * heads, {2 * self.heads}"
                )
        chosen(self.methods)  # refuses names that are none
        if not "".join(self.methods).strip(", "):
            refuse(self, "methods", f"expected some of {', '.join(METHODS)}")

    def student_decoder(self, vocabulary: int) -> DecoderConfig:
        """The student's shape."""
        return self._decoder(vocabulary, self.layers, self.width)

    def teacher_decoder(self, vocabulary: int) -> DecoderConfig:
        """The shape of a teacher that is trained here."""
        return self._decoder(vocabulary, self.teacher_layers, self.teacher_width)

    def _decoder(self, vocabulary: int, layers: int, width: int) -> DecoderConfig:
        return DecoderConfig(
            vocabulary=vocabulary,
            layers=layers,
            width=width,
            heads=self.heads,
            key_value_heads=self.heads,
            head_width=width // self.heads,
            mlp_width=3 * width,
            # Two blocks take 0.4 times as long so on a CPU (jax 0.10.2).
            unroll=layers,
        )

    def optimizer_for(self, peak: float, steps: int) -> optax.GradientTransformation:
        """With the schedule of a training."""
        rate = optax.warmup_cosine_decay_schedule(
            0.0, peak, warmup_steps=steps // 20, decay_steps=steps
        )
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(rate, b2=0.95, weight_decay=self.weight_decay),
        )

    def settings(self, teacher: str, texts: str) -> dict[str, Any]:
        """What the numbers of a run depend on, for its checkpoints.

        Args:
          teacher: where the teacher comes from.
          texts: what they are.
        """
        # More seeds, methods, hosts or another folder leave the runs as they are.
        apart = (
            "out",
            "seeds",
            "methods",
            "tensorboard",
            "trace_steps",
            "cluster",
            "data_dir",
        )
        own = dataclasses.asdict(self) | {"teacher": teacher, "text": texts}
        return {name: value for name, value in own.items() if name not in apart}

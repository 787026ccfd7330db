"""What the trainings say, read from their files: table, bars, curves, page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from etils.epath import Path

from experiments.jobs import comparison
from experiments.jobs.curves import records, series
from experiments.jobs.settings import as_html
from experiments.jobs.timing import Timing
from experiments.jobs.trainings import Result
from experiments.vision import figures
from experiments.vision.config import Config
from experiments.vision.methods import ALONE
from kdjax.io.files import write_whole
from kdjax.tools.report import Table, image, mean_and_spread, page, png

_COLUMNS = (
    "method",
    "last %",
    "best %",
    "gain",
    "better in",
    "agrees %",
    "KL",
    "ECE %",
    "time",
    "ms/step",
)
_DRAWN = 6


class Run(NamedTuple):
    """One training.

    Attributes:
      result: its end, on the test part.
      best_step: with the highest validation accuracy, the first of several.
      best_accuracy: on the test part at that step.
    """

    result: Result
    best_step: int
    best_accuracy: float

    @property
    def accuracy(self) -> float:
        """On the test part at the last step."""
        return self.result.scores["student_accuracy"]


class Results(NamedTuple):
    """Of the teacher, and of the methods in the order of the seeds.

    Attributes:
      teacher: what it ends with.
      runs: of each method.
      timings: of each method, beside the student alone.
      diverged: the methods that have no numbers, and what is told of each.
    """

    teacher: Result
    runs: dict[str, list[Run]]
    timings: dict[str, Timing]
    diverged: Mapping[str, str]

    def gains(self, name: str) -> list[float]:
        """Test accuracy over that of the student alone, seed by seed."""
        pairs = zip(self.runs[name], self.runs[ALONE], strict=True)
        return [run.accuracy - other.accuracy for run, other in pairs]

    def ranked(self) -> list[str]:
        """The methods by mean test accuracy at the last step, the best first."""

        def mean(name: str) -> float:
            return sum(run.accuracy for run in self.runs[name])

        return sorted(self.runs, key=mean, reverse=True)


def read(
    out: Path, methods: Sequence[str], seeds: int, diverged: Mapping[str, str]
) -> Results:
    """Reads the results of all runs, which must be finished or have diverged."""
    kept = [name for name in methods if name not in diverged]
    return Results(*comparison.finished(out, kept, seeds, _run), diverged)


def _run(folder: Path, result: Result) -> Run:
    best = max(records(folder, "eval"), key=lambda record: record["student_accuracy"])
    return Run(result, best["step"], best["test_accuracy"])


def table(results: Results) -> Table:
    """One row per method; numbers of the test part, mean ± spread over the seeds."""
    own = results.teacher.scores
    teacher = [
        "teacher",
        mean_and_spread([own["student_accuracy"]], digits=2, scale=100),
        *["–"] * 5,
        mean_and_spread([own["student_calibration_error"]], digits=1, scale=100),
        *["–"] * 2,
    ]
    rows = [teacher, *(_row(results, name) for name in results.runs)]
    for name in results.diverged:
        rows.append([name, "diverged", *["–"] * (len(_COLUMNS) - 2)])
    return Table(_COLUMNS, rows)


def _row(results: Results, name: str) -> list[str]:
    runs, timing = results.runs[name], results.timings[name]
    gains = results.gains(name)

    def of(values: Sequence[float], digits: int, scale: float = 100) -> str:
        return mean_and_spread(values, digits=digits, scale=scale)

    def scores(score: str) -> list[float]:
        return [run.result.scores[score] for run in runs]

    better = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
    return [
        name,
        of([run.accuracy for run in runs], 2),
        of([run.best_accuracy for run in runs], 2),
        "–" if name == ALONE else of(gains, 2),
        "–" if name == ALONE else better,
        of(scores("agreement"), 1),
        of(scores("forward_kl"), 3, 1),
        of(scores("student_calibration_error"), 1),
        f"{timing.ratio:.2f}",
        f"{timing.step_ms:.1f}",
    ]


def findings(results: Results) -> list[str]:
    """The methods with the largest gain, and how many gain at all."""
    others = [name for name in results.ranked() if name != ALONE]
    diverged = list(results.diverged.values())
    if not others:
        return diverged
    first, gains = others[0], results.gains(others[0])
    ahead = [name for name in others if sum(results.gains(name)) > 0]
    return [
        f"{first} is first, with a gain of "
        f"{mean_and_spread(gains, digits=2, scale=100)} points over alone.",
        f"{len(ahead)} of {len(others)} methods gain on average.",
        *diverged,
    ]


def write(config: Config, results: Results) -> Path:
    """Writes table, figures and page into the output folder; returns the page."""
    out, shown, told = config.out, table(results), findings(results)
    write_whole(out / "results.md", shown.markdown() + "\n")
    everything = {
        "teacher": dataclasses.asdict(results.teacher),
        "methods": {
            name: {
                "timing": dataclasses.asdict(results.timings[name]),
                "gains": results.gains(name),
                "runs": [
                    {
                        **dataclasses.asdict(run.result),
                        "best_step": run.best_step,
                        "best_accuracy": run.best_accuracy,
                    }
                    for run in runs
                ],
            }
            for name, runs in results.runs.items()
        },
        "diverged": dict(results.diverged),
        "findings": told,
    }
    write_whole(out / "results.json", json.dumps(everything, indent=2) + "\n")
    bars = png(figures.bars(_accuracies(results), ALONE))
    curves = png(figures.curves(_curves(config, results), ALONE))
    write_whole(out / "bars.png", bars)
    write_whole(out / "curves.png", curves)
    lines = "".join(f"<li>{escape(line)}</li>" for line in told)
    sections = {
        "Results on the test part": shown.html() + _NOTE + f"<ul>{lines}</ul>",
        "Accuracy by method": image(bars, _BARS_CAPTION),
        "Curves": image(curves, _CURVES_CAPTION),
        "Settings": as_html(config),
    }
    parameters = results.runs[ALONE][0].result.parameters
    labels = f"{config.labels:,} labelled images" if config.labels else "all labels"
    lead = (
        f"{config.teacher_model} ({results.teacher.parameters:,} parameters) distilled "
        f"into {config.student} ({parameters:,}) with {labels}. Students of one seed "
        "start from the same weights and see the same images in the same order."
    )
    path = out / "report.html"
    write_whole(path, page("Distilling images", lead, sections))
    return path


_NOTE = (
    '<p class="note">Last: test accuracy at the last step; best: at the step with the '
    "highest validation accuracy. Gain: over the student alone at the last step, seed "
    "by seed, in points. Agrees: how often the teacher names the same class. KL: "
    "KL(teacher ‖ student) at temperature 1, in nats. ECE: expected calibration error, "
    "15 bins. Time: of a step by that of the student alone, run in turns in one "
    "process. ± is the standard deviation over the seeds, each of which has its own "
    "weights, labelled images and order of batches; the teacher is one, and saw all "
    "labels.</p>"
)

_BARS_CAPTION = (
    "Test accuracy at the last step, mean and one standard deviation over the seeds; "
    "dots are seeds, the line is the student alone."
)

_CURVES_CAPTION = (
    f"On the validation part, the student alone and the {_DRAWN} methods that end "
    "highest on the test part; mean over the seeds, with a band of one standard "
    "deviation. KL is KL(teacher ‖ student) at temperature 1."
)


def _accuracies(results: Results) -> dict[str, list[float]]:
    return {
        name: [100 * run.accuracy for run in results.runs[name]]
        for name in results.ranked()
    }


def _curves(config: Config, results: Results) -> dict[str, figures.Curves]:
    ranked = [name for name in results.ranked() if name != ALONE][:_DRAWN]
    seeds = range(config.seeds)
    return {
        name: figures.Curves(
            *(
                series([config.out / name / f"seed-{n}" for n in seeds], "eval", score)
                for score in ("student_accuracy", "forward_kl")
            )
        )
        for name in (ALONE, *ranked)
    }

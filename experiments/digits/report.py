"""What the trainings say, read from their files: table, curves, pictures, page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils.epath import Path

from experiments.digits import figures
from experiments.digits.config import Config
from experiments.digits.data import CLASSES
from experiments.digits.kinds import (
    ALL_ALONE,
    ALL_DISTILLED,
    FEW_ALONE,
    FEW_DISTILLED,
    FEW_SAME_IMAGES,
    KINDS,
    Kind,
)
from experiments.jobs.curves import series
from experiments.jobs.data import Parts
from experiments.jobs.settings import as_html
from experiments.jobs.trainings import Result
from kdjax.io.files import write_whole
from kdjax.tools.report import Table, image, mean_and_spread, page, png

_COLUMNS = (
    "labels",
    "training",
    "params",
    "accuracy %",
    "agrees %",
    "KL",
    "ECE %",
    "ms/step",
)


class Results(NamedTuple):
    """Of the teacher, and of the students by kind, in the order of the seeds."""

    teacher: Result
    students: dict[Kind, list[Result]]


def read(out: Path, seeds: int) -> Results:
    """Reads the results of all runs, which must be finished."""

    def finished(folder: Path) -> Result:
        result = Result.read(folder)
        assert result is not None, folder
        return result

    students = {
        kind: [finished(kind.folder(out, seed)) for seed in range(seeds)]
        for kind in KINDS
    }
    return Results(finished(out / "teacher"), students)


def table(results: Results, config: Config) -> Table:
    """One row per kind; numbers of the test part, mean ± spread over the seeds."""
    own = results.teacher.scores
    teacher = [
        "all",
        "teacher",
        f"{results.teacher.parameters:,}",
        mean_and_spread([own["student_accuracy"]], digits=1, scale=100),
        "–",
        "–",
        mean_and_spread([own["student_calibration_error"]], digits=1, scale=100),
        _milliseconds([results.teacher]),
    ]
    rows = [
        [
            _labels(kind, config),
            kind.title,
            f"{runs[0].parameters:,}",
            mean_and_spread(_all(runs, "student_accuracy"), digits=1, scale=100),
            mean_and_spread(_all(runs, "agreement"), digits=1, scale=100),
            mean_and_spread(_all(runs, "forward_kl"), digits=2),
            mean_and_spread(
                _all(runs, "student_calibration_error"), digits=1, scale=100
            ),
            _milliseconds(runs),
        ]
        for kind, runs in results.students.items()
    ]
    return Table(_COLUMNS, [teacher, *rows], text_columns=2)


def findings(results: Results, config: Config) -> list[str]:
    """What distillation changed in test accuracy, seed by seed."""
    comparisons = (
        (FEW_DISTILLED, FEW_ALONE),
        (FEW_SAME_IMAGES, FEW_ALONE),
        (ALL_DISTILLED, ALL_ALONE),
    )
    lines = []
    for kind, baseline in comparisons:
        pairs = zip(results.students[kind], results.students[baseline], strict=True)
        gains = [
            run.scores["student_accuracy"] - other.scores["student_accuracy"]
            for run, other in pairs
        ]
        better = sum(gain > 0 for gain in gains)
        lines.append(
            f"{_titles(config)[not kind.few]}: {kind.title}, gains "
            f"{mean_and_spread(gains, digits=1, scale=100)} points of test accuracy "
            f"over alone; better in {better} of {len(gains)} seeds."
        )
    return lines


def write(config: Config, digits: Parts, results: Results) -> Path:
    """Writes table, figures and page into the output folder; returns the page."""
    out = config.out
    shown = table(results, config)
    told = findings(results, config)
    write_whole(out / "results.md", shown.markdown() + "\n")
    everything = {
        "teacher": dataclasses.asdict(results.teacher),
        "students": {
            kind.name: [dataclasses.asdict(run) for run in runs]
            for kind, runs in results.students.items()
        },
        "findings": told,
    }
    write_whole(out / "results.json", json.dumps(everything, indent=2) + "\n")
    curves = png(figures.curves(_curves(config), _titles(config)))
    targets = png(figures.soft_targets(_examples(config, digits), config.temperature))
    write_whole(out / "curves.png", curves)
    write_whole(out / "digits.png", targets)
    ratio = results.teacher.parameters / results.students[FEW_ALONE][0].parameters
    sections = {
        "Results on the test part": shown.html() + _notes(told, config),
        "Soft targets": image(targets, _TARGETS_CAPTION),
        "Curves": image(curves, _CURVES_CAPTION),
        "Settings": as_html(config),
    }
    lead = (
        "Handwritten digits of 8 × 8 pixels: a convolutional teacher, distilled into "
        f"a student {ratio:.0f} times smaller. Every student takes "
        f"{config.steps} steps; those of one seed start from the same weights."
    )
    path = out / "report.html"
    write_whole(path, page("Distilling digits", lead, sections))
    return path


_TARGETS_CAPTION = (
    "Digits of the test part that the teacher is least sure of, one of each class, "
    "and the class probabilities of the teacher and of the students of seed 0 with "
    "few labels, softened by the temperature. The true class is printed bold."
)

_CURVES_CAPTION = (
    "Mean over the seeds, with a band of one standard deviation. The losses of the "
    "students alone and distilled are different functions and share only the axis. "
    "KL is KL(teacher ‖ student) at temperature 1."
)


def _notes(told: Sequence[str], config: Config) -> str:
    spread = (
        "± is the standard deviation over the seeds, each of which draws its own "
        "labelled images, initial weights and order of batches. "
        if config.seeds > 1
        else ""
    )
    lines = "".join(f"<li>{line}</li>" for line in told)
    return (
        f'<p class="note">{spread}Agrees: how often the teacher names the same class. '
        "KL: KL(teacher ‖ student) at temperature 1, in nats. ECE: expected "
        "calibration error, 15 bins. The teacher saw all labels, so through it the "
        "distilled students profit from labels that the students alone never see."
        f"</p><ul>{lines}</ul>"
    )


def _labels(kind: Kind, config: Config) -> str:
    return f"{config.labels_per_class} each" if kind.few else "all"


def _titles(config: Config) -> tuple[str, str]:
    return f"{config.labels_per_class} labels per class", "all labels"


def _all(runs: Sequence[Result], name: str) -> list[float]:
    return [run.scores[name] for run in runs]


def _milliseconds(runs: Sequence[Result]) -> str:
    known = [run.step_ms for run in runs if run.step_ms is not None]
    # A single time has no spread worth telling: the machine has other work too.
    return f"{np.median(known):.1f}" if known else "–"


def _curves(config: Config) -> dict[Kind, figures.Curves]:
    """The records of all students."""
    curves = {}
    for kind in KINDS:
        folders = [kind.folder(config.out, seed) for seed in range(config.seeds)]
        curves[kind] = figures.Curves(
            {
                name: series(folders, of, name)
                for of, name in (
                    ("train", "loss"),
                    ("eval", "student_accuracy"),
                    ("eval", "forward_kl"),
                )
            }
        )
    return curves


def _examples(config: Config, digits: Parts) -> list[figures.Example]:
    """Of each class the test digit that the teacher is least sure of."""
    folders = {
        "teacher": config.out / "teacher",
        FEW_DISTILLED.title: FEW_DISTILLED.folder(config.out, 0),
        FEW_ALONE.title: FEW_ALONE.folder(config.out, 0),
    }
    soft = {
        title: np.asarray(
            jax.nn.softmax(
                np.load(folder / "test_logits.npy") / config.temperature, axis=-1
            )
        )
        for title, folder in folders.items()
    }
    label = digits.test["label"]
    sureness = soft["teacher"].max(-1)
    chosen = [
        min(np.flatnonzero(label == digit), key=lambda row: sureness[row])
        for digit in range(CLASSES)
    ]
    return [
        figures.Example(
            digits.test["x"][row, ..., 0],
            int(label[row]),
            {title: probabilities[row] for title, probabilities in soft.items()},
        )
        for row in chosen
    ]

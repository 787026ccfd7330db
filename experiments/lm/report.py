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
from experiments.lm import figures
from experiments.lm.config import Config
from experiments.lm.methods import ALONE, run_of
from kdjax.io.files import write_whole
from kdjax.tools.report import Table, image, mean_and_spread, page, png

_COLUMNS = (
    "method",
    "bits",
    "gain",
    "better in",
    "best",
    "gain, equal time",
    "perplexity",
    "KL(t‖s)",
    "KL(s‖t)",
    "agrees %",
    "entropy",
    "distinct",
    "time",
    "ms/step",
)
_DRAWN = 6


_TIME_IS_KNOWN_TO = 1.1
"""On shared cores the student alone takes 0.9 to 1.1 times as long as itself."""


class Run(NamedTuple):
    """One training.

    Attributes:
      result: its end, on the test part.
      best: the fewest bits per character on the validation part, along the way.
    """

    result: Result
    best: float

    @property
    def bits(self) -> float:
        """Per character of the test part, at the last step."""
        return self.result.scores["bits"]


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

    def gains(self, name: str, over: str = ALONE) -> list[float]:
        """Bits per character fewer than those of another method, seed by seed."""
        pairs = zip(self.runs[over], self.runs[name], strict=True)
        return [other.bits - run.bits for other, run in pairs]

    def time(self, name: str) -> float:
        """How many times as long as the student alone a training takes."""
        return self.timings[name].ratio * run_of(name).factor

    def as_long(self, name: str) -> str | None:
        """The shortest training of the student alone that takes as long as a method."""
        if run_of(name).method == ALONE:
            return None
        least = self.time(name) / _TIME_IS_KNOWN_TO
        alone = {
            run_of(each).factor: each
            for each in self.runs
            if run_of(each).method == ALONE and run_of(each).factor >= least
        }
        return alone[min(alone)] if alone else None

    def ranked(self) -> list[str]:
        """The methods by mean bits per character, the fewest first."""
        return sorted(
            self.runs, key=lambda name: sum(run.bits for run in self.runs[name])
        )


def read(
    out: Path, methods: Sequence[str], seeds: int, diverged: Mapping[str, str]
) -> Results:
    """Reads the results of all runs, which must be finished or have diverged."""
    kept = [name for name in methods if name not in diverged]
    return Results(*comparison.finished(out, kept, seeds, _run), diverged)


def _run(folder: Path, result: Result) -> Run:
    return Run(result, min(record["bits"] for record in records(folder, "eval")))


def table(results: Results) -> Table:
    """One row per method; numbers of the test part, mean ± spread over the seeds."""
    own = results.teacher.scores
    teacher = ["teacher", f"{own['bits']:.3f}", *["–"] * (len(_COLUMNS) - 2)]
    for column, score in (
        ("perplexity", "perplexity"),
        ("entropy", "entropy"),
        ("distinct", "distinct_2"),
    ):
        teacher[_COLUMNS.index(column)] = f"{own[score]:.2f}"
    rows = [teacher, *(_row(results, name) for name in results.runs)]
    for name in results.diverged:
        rows.append([name, "diverged", *["–"] * (len(_COLUMNS) - 2)])
    return Table(_COLUMNS, rows)


def _row(results: Results, name: str) -> list[str]:
    runs, timing = results.runs[name], results.timings[name]
    gains, other = results.gains(name), results.as_long(name)

    def scores(score: str, digits: int, scale: float = 1.0) -> str:
        # A student of other tokens than the teacher's is not compared with it.
        if score not in runs[0].result.scores:
            return "–"
        values = [run.result.scores[score] for run in runs]
        return mean_and_spread(values, digits=digits, scale=scale)

    def gained(over: str | None) -> str:
        if over in (None, name):
            return "–"
        return mean_and_spread(results.gains(name, over), digits=3)

    better = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
    return [
        name,
        scores("bits", 3),
        gained(ALONE),
        "–" if name == ALONE else better,
        mean_and_spread([run.best for run in runs], digits=3),
        gained(other),
        scores("perplexity", 2),
        scores("forward_kl", 3),
        scores("reverse_kl", 3),
        scores("agreement", 1, 100),
        scores("entropy", 2),
        scores("distinct_2", 2),
        f"{results.time(name):.2f}",
        f"{timing.step_ms:.0f}",
    ]


def findings(results: Results) -> list[str]:
    """The method with the largest gain, and how many gain at all."""
    others = [name for name in results.ranked() if run_of(name).method != ALONE]
    diverged = list(results.diverged.values())
    if not others:
        return diverged
    ahead = [name for name in others if sum(results.gains(name)) > 0]
    gain = mean_and_spread(results.gains(others[0]), digits=3)
    return [
        f"{others[0]} is first, with a gain of {gain} bits per character over alone.",
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
                    {**dataclasses.asdict(run.result), "best": run.best} for run in runs
                ],
            }
            for name, runs in results.runs.items()
        },
        "diverged": dict(results.diverged),
        "findings": told,
    }
    write_whole(out / "results.json", json.dumps(everything, indent=2) + "\n")
    bits = {name: [run.bits for run in results.runs[name]] for name in results.ranked()}
    bars = png(figures.bars(bits, ALONE, results.teacher.scores["bits"]))
    curves = png(figures.curves(_curves(config, results), ALONE))
    write_whole(out / "bars.png", bars)
    write_whole(out / "curves.png", curves)
    lines = "".join(f"<li>{escape(line)}</li>" for line in told)
    sections = {
        "Results on the test part": shown.html() + _NOTE + f"<ul>{lines}</ul>",
        "Bits per character by method": image(bars, _BARS_CAPTION),
        "Curves": image(curves, _CURVES_CAPTION),
        "Samples": _samples(config, results),
        "Settings": as_html(config),
    }
    parameters = results.runs[ALONE][0].result.parameters
    size = (
        f"{config.characters:,} characters" if config.characters else "all of the text"
    )
    lead = (
        f"A teacher of {results.teacher.parameters:,} parameters distilled into "
        f"students of {parameters:,}, which see {size}. Students of one seed start "
        "from the same weights and see the same rows in the same order."
    )
    path = out / "report.html"
    write_whole(path, page("Distilling language models", lead, sections))
    return path


def _samples(config: Config, results: Results) -> str:
    """How the teacher and some methods go on with one text."""
    shown = {"teacher": config.out / "teacher"}
    for name in dict.fromkeys((ALONE, *results.ranked()[:3])):
        shown[name] = config.out / name / "seed-0"
    parts = []
    for name, folder in shown.items():
        first = json.loads((folder / "samples.json").read_text())[0]
        prompt, text = escape(first["prompt"]), escape(first["text"])
        parts.append(f"<p>{escape(name)}<br><code>{prompt}</code> {text}</p>")
    return "".join(parts)


_NOTE = """<p class="note">Bits: per character of the test part, at the last step.
Gain: bits fewer than the student alone at equal steps, seed by seed. Best: bits of
the validation part where they were fewest. Gain, equal time: over the shortest
training of the student alone that took as long (within a tenth), by a schedule of its
own (alone:4 has 4 times the steps). Perplexity: per token. KL and entropy: in nats
per token, at temperature 1, of teacher (t) and student (s). Agrees: how often the
teacher names the same token. Distinct: share of different ones among the pairs of
words in samples. Time: of a training by that of the student alone, its steps run in
turns in one process. ± is the standard deviation over the seeds, each of which has
its own weights, passage of text and order of rows; the teacher is one.</p>"""

_BARS_CAPTION = """Bits per character of the test part at the last step, mean and one
standard deviation over the seeds; dots are seeds, the lines are the student alone and
the teacher."""

_CURVES_CAPTION = f"""Bits per character of the validation part over steps and over
seconds of training, of the student alone and the {_DRAWN} methods that end with the
fewest; mean over the seeds, with a band of one standard deviation."""


def _curves(config: Config, results: Results) -> dict[str, figures.Curve]:
    ranked = [name for name in results.ranked() if run_of(name).factor == 1]
    drawn = [name for name in ranked if name != ALONE][:_DRAWN]
    longer = [n for n in results.runs if run_of(n).method == ALONE and n != ALONE]
    # The steps of all on one clock, that of the student alone.
    clock = results.timings[ALONE].step_ms / 1e3
    return {
        name: figures.Curve(
            series(
                [config.out / name / f"seed-{seed}" for seed in range(config.seeds)],
                "eval",
                "bits",
            ),
            clock * results.timings[name].ratio,
        )
        for name in (ALONE, *longer[-1:], *drawn)
    }

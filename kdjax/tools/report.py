"""Results to look at: tables for terminal and Markdown, and pages in one file.

Figures are Matplotlib's, but this module only asks them to draw themselves, and so
does not import it.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.markup
import rich.table

_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2430; background: #fff;
       max-width: 68rem; margin: 2.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin-bottom: .3rem }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem }
p { max-width: 46rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem; text-align: right; white-space: nowrap }
th { border-bottom: 2px solid #1f2430; font-weight: 600 }
td { border-bottom: 1px solid #e3e6ec }
th.text, td.text { text-align: left }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto }
figcaption, .note { color: #5b6272; font-size: .9rem; max-width: 46rem }
code { background: #f2f4f7; padding: .1rem .3rem; border-radius: 3px }
"""

# The browser itself then refuses whatever would be loaded from elsewhere.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
      columns: the headings.
      rows: as many texts each.
      text_columns: how many of the first columns are words; the others are numbers,
        set flush right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"rows: got {len(row)} texts in {list(row)}; expected one for each "
                    f"of the columns {list(self.columns)}."
                )

    def print(self, console: rich.console.Console) -> None:
        """Prints it in a terminal, of which no number and no word is cut.

        Where the terminal is narrow, the last of the texts are wrapped between words;
        where it is narrower than that, or a pipe, lines are longer than it.
        """
        shown = self._rich()
        widest = rich.console.Console(width=10_000, file=io.StringIO())
        natural = widest.measure(shown).maximum
        shown.width = max(natural - self._slack(), min(natural, console.width))
        console.print(shown, crop=False)

    def _slack(self) -> int:
        """How much narrower the column that gives way is when it is wrapped."""
        if not self.text_columns:
            return 0
        texts = [row[self.text_columns - 1] for row in [self.columns, *self.rows]]
        words = [word for text in texts for word in text.split()]
        return max(map(len, texts)) - max(map(len, words), default=0)

    def _rich(self) -> rich.table.Table:
        shown = rich.table.Table(
            box=rich.box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=0,
        )
        for index, name in enumerate(self.columns):
            justify: Any = "left" if index < self.text_columns else "right"
            gives_way = index == self.text_columns - 1
            shown.add_column(
                rich.markup.escape(name), justify=justify, no_wrap=not gives_way
            )
        for row in self.rows:
            shown.add_row(*map(rich.markup.escape, row))
        return shown

    def markdown(self) -> str:
        """The table for a README.

        Example:
          >>> print(Table(["loss", "accuracy"], [["KL", "0.9"]]).markdown())
          | loss | accuracy |
          |:--|--:|
          | KL | 0.9 |
        """
        ruler = [
            ":--" if index < self.text_columns else "--:"
            for index in range(len(self.columns))
        ]
        body = [self.columns, *self.rows]
        lines = ["| " + " | ".join(cells) + " |" for cells in body]
        return "\n".join([lines[0], "|" + "|".join(ruler) + "|", *lines[1:]])

    def html(self) -> str:
        """The table for a page."""
        return (
            '<div class="wide"><table><thead>'
            + self._html_row("th", self.columns)
            + "</thead><tbody>"
            + "".join(self._html_row("td", row) for row in self.rows)
            + "</tbody></table></div>"
        )

    def _html_row(self, tag: str, cells: Sequence[str]) -> str:
        marked = []
        for index, cell in enumerate(cells):
            kind = ' class="text"' if index < self.text_columns else ""
            marked.append(f"<{tag}{kind}>{html.escape(cell)}</{tag}>")
        return f"<tr>{''.join(marked)}</tr>"


def mean_and_spread(values: Sequence[float], *, digits: int, scale: float = 1.0) -> str:
    """Mean and sample standard deviation as a text.

    Args:
      values: one per run; with a single one there is no spread to tell.
      digits: after the point.
      scale: factor on the values, such as 100 for per cent.

    Returns:
      ``"mean ± spread"``.

    Raises:
      ValueError: there are no values.

    Example:
      >>> mean_and_spread([0.96, 0.98], digits=1, scale=100)
      '97.0 ± 1.4'
      >>> mean_and_spread([0.96], digits=1, scale=100)
      '96.0'
    """
    if not len(values):
        raise ValueError("values: got none; expected at least one.")
    scaled = scale * np.asarray(values, np.float64)
    mean = f"{scaled.mean():.{digits}f}"
    if len(scaled) == 1:
        return mean
    return f"{mean} ± {scaled.std(ddof=1):.{digits}f}"


def draw_band(
    axes: Any, x: Sequence[float], runs: Sequence[Sequence[float]], **line: Any
) -> None:
    """Draws the mean over runs as a line, and one standard deviation as a band.

    Args:
      axes: Matplotlib's.
      x: ``[N]``, such as the steps.
      runs: ``[R, N]``, one curve per run.
      **line: ``color``, ``label`` and whatever else ``axes.plot`` takes.

    Raises:
      ValueError: the curves have other lengths than ``x``.
    """
    curves = np.asarray(runs, np.float64)
    if curves.ndim != 2 or curves.shape[1] != len(x):
        raise ValueError(
            f"runs: got shape {curves.shape}; expected one curve of {len(x)} values "
            "per run."
        )
    mean = curves.mean(0)
    # No line joins a single point.
    marker = {"marker": "o"} if len(x) == 1 else {}
    (drawn,) = axes.plot(x, mean, **marker | line)
    if len(curves) > 1:
        spread = curves.std(0, ddof=1)
        axes.fill_between(
            x,
            mean - spread,
            mean + spread,
            color=drawn.get_color(),
            alpha=0.18,
            linewidth=0,
        )


def png(figure: Any, *, dpi: int = 150) -> bytes:
    """A Matplotlib figure as a PNG file, the same bytes for the same figure."""
    buffer = io.BytesIO()
    # Without the version of Matplotlib that wrote it.
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def image(picture: bytes, caption: str) -> str:
    """A PNG file as a part of a page, with what it shows below it."""
    encoded = base64.b64encode(picture).decode("ascii")
    text = html.escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{encoded}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def page(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """A web page in one file, which loads nothing from anywhere.

    Args:
      title: plain text.
      lead: plain text, what the page shows.
      sections: HTML by heading: tables, images, paragraphs.

    Returns:
      The HTML.

    Example:
      >>> "<h2>Results</h2>" in page("Digits", "Five seeds.", {"Results": "<p>98</p>"})
      True
    """
    body = "\n".join(
        f"<h2>{html.escape(heading)}</h2>\n{content}"
        for heading, content in sections.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>\n{body}\n"
        "</body></html>\n"
    )

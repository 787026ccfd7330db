"""Where texts come from: six novels, the Bible, or a user's own files."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import rdata
from etils.epath import Path

ROOTS = (Path("/"), Path("data"))
"""Where Debian packages are looked for: installed, or unpacked here."""

NOVELS = (
    "sensesensibility",
    "prideprejudice",
    "mansfieldpark",
    "emma",
    "northangerabbey",
    "persuasion",
)
"""In the order in which they were published."""


class Document(NamedTuple):
    """One text."""

    name: str
    text: str


def austen(folder: Path | None) -> list[Document]:
    """Jane Austen's six novels, 4.0 million characters, of r-cran-janeaustenr.

    Args:
      folder: into which the Debian package was unpacked, or the R package in it;
        ``None`` looks in :data:`ROOTS`.

    Raises:
      OSError: they are not there.
      ValueError: they are not what was expected.
    """
    place = Path("usr/lib/R/site-library/janeaustenr")
    found = _found(folder, [place, Path(place.name), Path()], "data/Rdata.rdx")
    if found is None:
        raise _missing(folder, "novels", "r-cran-janeaustenr")
    index, contents = found / "data/Rdata.rdx", found / "data/Rdata.rdb"
    try:
        places = rdata.read_rds(index)["variables"]
        content = contents.read_bytes()
        return [Document(name, _novel(content, *places[name])) for name in NOVELS]
    except (KeyError, TypeError, ValueError, NotImplementedError, zlib.error) as error:
        raise ValueError(
            f"--data-dir: cannot read {contents} by {index} ({error!r}); expected the "
            f"novels {', '.join(NOVELS)}, as R's package janeaustenr has them."
        ) from error


def _novel(content: bytes, start: int, length: int) -> str:
    """An entry of R's lazy-load database: 4 bytes of length, and a deflated value."""
    value = zlib.decompress(content[start + 4 : start + length])
    lines = rdata.parser.parse_data(value, extension=".rds")
    return "\n".join(map(str, rdata.conversion.convert(lines)))


def bible(folder: Path | None) -> list[Document]:
    """The King James Bible, 4.1 million characters, of bible-kjv and bible-kjv-text.

    The text is packed in a format of its own, which the packages' program reads.

    Args:
      folder: into which both Debian packages were unpacked; ``None`` looks in
        :data:`ROOTS`, and for the program where all programs are.

    Raises:
      OSError: it is not there, or its program fails.
      ValueError: it is not what was expected.
    """
    found = _found(folder, [Path()], "usr/lib/bible.data")
    program = None if found is None else shutil.which(str(found / "usr/bin/bible"))
    if found is None or program is None:
        raise _missing(folder, "Bible", "bible-kjv bible-kjv-text")
    options = ["-p", str(found / "usr/lib"), "-f", "gen1:1-rev22:21"]
    told = subprocess.run([program, *options], capture_output=True, check=False)
    if told.returncode:
        raise OSError(
            f"--data-dir: {program} failed: {told.stderr.decode(errors='replace')}"
        )
    books: dict[str, list[str]] = {}
    for line in told.stdout.decode("ascii").splitlines():
        verse = re.fullmatch(r"(\d?[A-Za-z]+)\d+:\d+ (.*)", line)
        if verse is None:
            raise ValueError(
                f"--data-dir: {program} told {line[:60]!r}; expected verses such as "
                "'Ge1:1 In the beginning ...'."
            )
        books.setdefault(verse[1], []).append(verse[2])
    return [Document(name, "\n".join(verses)) for name, verses in books.items()]


CORPORA: dict[str, Callable[[Path | None], list[Document]]] = {
    "austen": austen,
    "bible": bible,
}
"""Texts that come with Debian, by name."""


def files(path: Path) -> list[Document]:
    """A text file, or all files ``*.txt`` of a folder and those in it, by name.

    Raises:
      OSError: there is none, or it cannot be read.
      ValueError: a file is empty, or not in UTF-8.
    """
    if not path.exists():
        raise OSError(f"--text: found no {path}; expected a text file or a folder.")
    found = [path]
    if path.is_dir():
        # Walked, since a path of etils refuses to search folders below.
        below = (root / name for root, _, names in path.walk() for name in names)
        found = sorted(each for each in below if each.suffix == ".txt")
    if not found:
        raise OSError(f"--text: {path} has no file *.txt; expected one or more.")
    return [Document(each.stem, _content(each)) for each in found]


def _content(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text: {path} is not in UTF-8 ({error.reason} at byte {error.start}); "
            "expected UTF-8, which iconv makes of others."
        ) from error
    if not text.strip():
        raise ValueError(f"--text: {path} is empty; expected a text.")
    return text.replace("\r\n", "\n")


def _found(folder: Path | None, below: Sequence[Path], inside: str) -> Path | None:
    """The first place that has a file, below the folder or the usual roots."""
    roots = ROOTS if folder is None else (folder,)
    places = [root / path for root in roots for path in below]
    return next((place for place in places if (place / inside).is_file()), None)


def _missing(folder: Path | None, what: str, packages: str) -> OSError:
    looked = " or ".join(map(str, ROOTS)) if folder is None else str(folder)
    downloaded = " ".join(f"{package}_*.deb" for package in packages.split())
    unpack = f"for deb in {downloaded}; do dpkg -x $deb data; done"
    return OSError(
        f"--data-dir: found no {what} in {looked}. Debian has it; with root:\n"
        f"  apt-get install {packages}\n"
        f"without, into data, where it is found:\n"
        f"  apt-get download {packages} && {unpack}"
    )

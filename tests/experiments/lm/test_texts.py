"""Texts: where they come from, how they are parted, and what is refused."""

import gzip
import stat
import zlib

import numpy as np
import pytest
import rdata
from etils.epath import Path

from experiments.lm.sources import NOVELS, Document, austen, bible, files
from experiments.lm.texts import passage, split

PLACE = "usr/lib/R/site-library/janeaustenr"


def write_novels(root, lines):
    """A lazy-load database like the one of R's package janeaustenr."""
    folder = root / PLACE / "data"
    folder.mkdir(parents=True)
    content, places = b"", {}
    for name in NOVELS:
        rdata.write_rds(folder / "novel.rds", np.array([name, *lines]))
        value = gzip.decompress((folder / "novel.rds").read_bytes())
        packed = len(value).to_bytes(4, "big") + zlib.compress(value)
        places[name] = np.array([len(content), len(packed)], np.int32)
        content += packed
    (folder / "Rdata.rdb").write_bytes(content)
    rdata.write_rds(folder / "Rdata.rdx", {"variables": places})


def test_novels_are_read_from_an_unpacked_package(tmp_path):
    write_novels(tmp_path, ["It cost £5,", "", "said Emma."])
    documents = austen(tmp_path)
    assert [document.name for document in documents] == list(NOVELS)
    assert documents[0].text == "sensesensibility\nIt cost £5,\n\nsaid Emma."
    assert austen(tmp_path / PLACE) == documents


def write_program(root, script):
    """A program in the place of the one that unpacks the Bible."""
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/lib").mkdir()
    (root / "usr/lib/bible.data").touch()
    program = root / "usr/bin/bible"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_the_bible_is_read_book_by_book(tmp_path):
    told = ["Ge1:1 In the beginning", "Ge1:2 And the earth", "1Sm1:1 Now there was"]
    write_program(tmp_path, "\n".join(f"echo {line!r}" for line in told))
    assert bible(tmp_path) == [
        Document("Ge", "In the beginning\nAnd the earth"),
        Document("1Sm", "Now there was"),
    ]


@pytest.mark.parametrize(
    ("script", "told"),
    [("echo hello", "expected verses"), ("echo no data >&2; exit 1", "no data")],
)
def test_a_program_that_tells_something_else_is_refused(tmp_path, script, told):
    write_program(tmp_path, script)
    with pytest.raises((OSError, ValueError), match=told):
        bible(tmp_path)


def test_files_of_a_folder_are_documents(tmp_path):
    (tmp_path / "b.txt").write_bytes("zwei\r\nübel".encode())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.txt").write_text("one")
    (tmp_path / "notes.md").write_text("not this")
    found = [Document("c", "one"), Document("b", "zwei\nübel")]
    assert files(Path(tmp_path)) == found
    assert files(Path(tmp_path) / "b.txt") == found[1:]


def test_missing_texts_are_refused_with_how_to_get_them(tmp_path):
    with pytest.raises(OSError, match="apt-get install r-cran-janeaustenr"):
        austen(tmp_path)
    with pytest.raises(OSError, match=r"dpkg -x .* data"):
        bible(tmp_path)
    with pytest.raises(OSError, match=r"--text: found no .*nowhere"):
        files(Path(tmp_path) / "nowhere")
    with pytest.raises(OSError, match=r"has no file \*\.txt"):
        files(Path(tmp_path))


def test_bad_files_are_refused_by_name(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        files(Path(tmp_path))
    (tmp_path / "empty.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(ValueError, match=r"empty\.txt is not in UTF-8 .* byte 3"):
        files(Path(tmp_path))


def test_a_broken_package_is_refused(tmp_path):
    write_novels(tmp_path, ["text"])
    (tmp_path / PLACE / "data/Rdata.rdb").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read .*Rdata\.rdb"):
        austen(tmp_path)


def documents(*lengths):
    letters = "abcdefghij"
    return [Document(letters[i], letters[i] * n) for i, n in enumerate(lengths)]


def test_whole_documents_are_held_out():
    parts = split(documents(5000, 4000, 1000))
    assert parts.test == ["c" * 1000]
    assert parts.train == ["a" * 5000, "b" * 3820]
    assert parts.validation == ["b" * 180]  # 9000 / 50


def test_a_single_document_is_cut():
    parts = split(documents(10_000))
    assert [len(text) for text in (*parts.train, *parts.validation, *parts.test)] == [
        8820,
        180,
        1000,
    ]


def test_a_validation_part_may_go_over_documents():
    parts = split(documents(9000, 10, 1500))
    assert parts.test == ["c" * 1500]
    assert parts.validation == ["a" * 170, "b" * 10]


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match=r"got 30 characters; expected at least 1000"):
        split(documents(30))


def test_too_little_before_the_test_part_is_refused():
    with pytest.raises(ValueError, match=r"got 49 characters without .* at least 50"):
        split(documents(49, 2000))
    assert split(documents(50, 2000)).validation == ["a"]


def test_other_texts_have_another_fingerprint():
    first, same, other = (
        split(documents(*lengths)).fingerprint
        for lengths in ((900, 200), (900, 200), (900, 201))
    )
    assert first == same != other


def test_passages_are_drawn_by_the_seed():
    texts = [document.text for document in documents(300, 5, 300)]
    joined = "".join(texts)
    drawn = [passage(texts, 200, seed) for seed in range(20)]
    assert all(sum(map(len, pieces)) == 200 for pieces in drawn)
    assert all("".join(pieces) in joined for pieces in drawn)
    assert len({"".join(pieces) for pieces in drawn}) > 10
    assert max(map(len, drawn)) == 3  # some go over three documents
    assert passage(texts, 200, 3) == drawn[3]
    assert passage(texts, 0, 3) == passage(texts, 1000, 3) == texts

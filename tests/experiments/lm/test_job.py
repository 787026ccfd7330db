"""The job on language models: what it writes, continues and refuses."""

import json
import re
import shutil

import numpy as np
import pytest

from experiments.lm.config import Config
from experiments.lm.evaluation import distinct
from experiments.lm.main import main
from experiments.lm.methods import METHODS, chosen, run_of
from experiments.lm.tokens import make


def write_text(path):
    """Sentences of few words, of which there is something to learn."""
    rng = np.random.default_rng(0)
    words = ["the cat", "a dog", "sees", "eats", "the bird", "and", "runs", "home"]
    lines = [" ".join(rng.choice(words, 6)) + ".\n" for _ in range(120)]
    path.write_text("".join(lines))


TINY = {
    "characters": 2000,
    "seeds": 1,
    "steps": 2,
    "teacher-steps": 2,
    "batch-size": 16,
    "context": 16,
    "prompt": 4,
    "layers": 1,
    "width": 8,
    "heads": 2,
    "teacher-layers": 1,
    "teacher-width": 8,
    "evaluations": 2,
    "checkpoints": 1,
}


def arguments(folder, **changed):
    options = TINY | {name.replace("_", "-"): value for name, value in changed.items()}
    given = [f"--{name}={value}" for name, value in options.items()]
    return [f"--text={folder / 'text.txt'}", f"--out={folder / 'out'}", *given]


@pytest.mark.slow
def test_students_of_other_tokens_are_compared_by_their_bits(tmp_path):
    write_text(tmp_path / "text.txt")
    methods = "uld,chunk_likelihood,cached,distillm2"
    assert main(arguments(tmp_path, methods=methods, vocabulary=300, context=32)) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())["methods"]
    for name in ("uld", "chunk_likelihood"):
        scores = results[name]["runs"][0]["scores"]
        assert "forward_kl" not in scores
        assert 1 < scores["bits"] < 8
    assert "forward_kl" in results["cached"]["runs"][0]["scores"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    write_text(folder / "text.txt")
    assert main(arguments(folder, methods="gkd")) == 0
    return folder


def test_table_page_and_numbers(finished):
    out = finished / "out"
    assert len((out / "results.md").read_text().splitlines()) == 2 + 3
    results = json.loads((out / "results.json").read_text())
    assert set(results["methods"]) == {"alone", "gkd"}
    for method in results["methods"].values():
        (run,) = method["runs"]
        scores = run["scores"]
        # Nearly untrained, a student is as good as guessing among some 20 characters.
        assert 3 < scores["bits"] < 6
        assert run["best"] < 6
        assert scores["forward_kl"] >= 0
        assert 0 <= scores["agreement"] <= 1
        assert 0 < scores["distinct_2"] <= 1
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    samples = json.loads((out / "gkd/seed-0/samples.json").read_text())
    text = (finished / "text.txt").read_text()
    assert all(sample["prompt"] in text for sample in samples)


def test_perplexity_is_of_the_text_alone(finished):
    # A character is a token, so that both say the same; gkd's loss is something else.
    result = json.loads((finished / "out/gkd/seed-0/result.json").read_text())
    scores = result["scores"]
    np.testing.assert_allclose(2 ** scores["bits"], scores["perplexity"], rtol=1e-6)


@pytest.mark.slow
def test_partly_finished_it_does_only_what_is_missing(finished, capsys):
    out = finished / "out"
    names = ("metrics.jsonl", "samples.json", "result.json")
    before = {name: (out / "gkd/seed-0" / name).read_bytes() for name in names}
    (out / "gkd/seed-0/result.json").unlink()
    (out / "gkd/seed-0/samples.json").unlink()
    assert main(arguments(finished, methods="gkd")) == 0
    assert "student 1 of 1: gkd, seed 0" in capsys.readouterr().out
    for name in names:
        assert (out / "gkd/seed-0" / name).read_bytes() == before[name], name
    assert main(arguments(finished, methods="gkd")) == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trained_teacher_serves_another_job(finished, capsys):
    teacher = finished / "out/teacher"
    given = arguments(finished, methods="alone", teacher=teacher, seeds=1)
    given = [each for each in given if not each.startswith("--out")]
    other = finished / "other"
    assert main([*given, f"--out={other}"]) == 0
    first, second = (
        json.loads((out / "teacher/result.json").read_text())["scores"]
        for out in (finished / "out", other)
    )
    assert first == second


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("batch-size", "8", r"multiple of 16, 2 for each of the 8 device"),
        ("characters", "100", r"which are 7 row\(s\) of 16 tokens"),
        ("teacher", "nowhere", r"--teacher: .*nowhere.*tokenizer\.json"),
        ("methods", "from_layers", r"from_layers needs a student like the teacher"),
        ("text", "nowhere", "--text: found no nowhere"),
        ("top-k", "99", r"--top-k: got 99; expected 1 to \d\d, the vocabulary"),
        ("steps", "3", "holds runs with other settings"),
    ],
)
def test_refused_before_anything_is_trained(finished, option, value, told, capsys):
    changed = {"width": 16} if option == "methods" else {}
    given = arguments(finished, methods="gkd", **changed)
    given = [each for each in given if not each.startswith(f"--{option}=")]
    assert main([*given, f"--{option}={value}"]) == 2
    assert re.search(told, capsys.readouterr().err, re.DOTALL)


def test_a_teacher_with_too_few_tokens_is_refused(finished, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(finished / "out/teacher", teacher)
    make("bytes", [], "", 0).write(teacher / "tokenizer.json")
    assert main(arguments(finished, teacher=teacher)) == 2
    told = r"--teacher: got a vocabulary of \d\d for the 257 tokens"
    assert re.search(told, capsys.readouterr().err)


def test_a_folder_with_other_contents_is_refused(tmp_path, capsys):
    write_text(tmp_path / "text.txt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/settings.json").write_text("[]")
    assert main(arguments(tmp_path)) == 2
    assert "--out: cannot use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("letters", "given", "told"),
    [
        # Seed 0 draws letters of two bytes, seed 1 those of one.
        (
            "one by one " * 180 + "éàèù " * 200,
            {"tokenizer": "bytes", "characters": 100},
            r"7 row\(s\) of 16 tokens for seed 1",
        ),
        # Here are more byte pairs than characters, and so fewer rows in the end.
        (
            "".join(map(chr, range(0x4E00, 0x5400))),
            {"methods": "alone_bpe", "characters": 107},
            r"7 row\(s\) of byte pairs for seed 0",
        ),
    ],
)
def test_passages_of_all_students_are_long_enough(
    letters, given, told, tmp_path, capsys
):
    (tmp_path / "text.txt").write_text(letters)
    assert main(arguments(tmp_path, seeds=2, vocabulary=300, **given)) == 2
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("seeds", "0", "at least 1"),
        ("top-p", "1.5", "at most 1"),
        ("prompt", "128", "below --context"),
        ("width", "30", "multiple of 2 * heads"),
        ("vocabulary", "100", "at least 300"),
        ("methods", "distill", "forward_kl"),
        ("methods", ",", "expected some of alone"),
        ("tokenizer", "words", "bpe"),
    ],
)
def test_refused_options_are_named(option, value, told, capsys):
    with pytest.raises(SystemExit) as exited:
        main([f"--{option}", value])
    assert exited.value.code == 2
    # A box may be drawn around it, and lines broken.
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert option in shown
    assert told in shown
    assert "Traceback" not in shown


def test_every_option_has_a_help_line(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--help"])
    assert exited.value.code == 0
    shown = capsys.readouterr().out
    for name in vars(Config()):
        assert "--" + name.replace("_", "-") in shown


def test_names_of_methods():
    assert chosen(["gkd,alone:4", "gkd"]) == ["alone", "gkd", "alone:4"]
    assert set(chosen(["all"])) == {*METHODS, "alone:2", "alone:4"}
    assert run_of("alone:4") == ("alone", 4)
    assert run_of("gkd") == ("gkd", 1)
    for name in ("gkd:", "gkd:0", "gkd:x", "nothing"):
        with pytest.raises(ValueError, match=r"--methods: .*alone:4"):
            chosen([name])


@pytest.mark.parametrize("names", [["alone"], ["alone,alone"], ["alone", "alone"]])
def test_the_baseline_may_be_asked_for_once_or_more_often(names):
    assert chosen(Config(methods=names).methods) == ["alone"]


def test_distinct_pairs_of_words():
    assert distinct(["a b a b", "a b"], 2) == 2 / 4
    assert distinct(["a"], 2) == 0

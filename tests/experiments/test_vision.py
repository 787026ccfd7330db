"""The vision benchmark: views, networks, methods, and the job as a whole."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.vision.augmentation import Augmentation
from experiments.vision.config import Config
from experiments.vision.main import main
from experiments.vision.methods import (
    ALONE,
    METHODS,
    Setup,
    Unfit,
    chosen,
    objective,
)
from experiments.vision.models import Statistics, maker, network
from kdjax import Outputs, make_train_step, objectives, teachers
from kdjax.io.input import batches
from kdjax.train import init_state
from tests.experiments.image_files import CLASSES, LARGER, SHAPE, write_set
from tests.marks import rest_slow


def viewed(augmentation, batch_size, count=24):
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.integers(0, 256, (count, *SHAPE)).astype(np.uint8),
        "label": np.arange(count) % CLASSES,
    }
    source = batches(
        arrays, batch_size=batch_size, seed=3, epochs=1, transform=augmentation
    )
    return arrays, list(source)


def test_views_do_not_depend_on_the_batch():
    seen = []
    for size in (4, 12):
        _, given = viewed(Augmentation(padding=2), size)
        pairs = [
            (int(index), x.tobytes())
            for batch in given
            for index, x in zip(batch["index"], batch["x"], strict=True)
        ]
        seen.append(dict(pairs))
    assert seen[0] == seen[1]
    arrays, given = viewed(Augmentation(padding=2), 24)
    assert given[0]["x"].dtype == np.uint8
    moved = [
        x.tobytes() != arrays["x"][index].tobytes()
        for index, x in zip(given[0]["index"], given[0]["x"], strict=True)
    ]
    assert sum(moved) > 20


def test_without_augmentation_images_stay_as_they_are():
    arrays, given = viewed(Augmentation(padding=0, flip=False), 24)
    np.testing.assert_array_equal(given[0]["x"], arrays["x"][given[0]["index"]])


def test_mixup_tells_whose_labels_a_blend_has():
    arrays, given = viewed(Augmentation(padding=0, flip=False, mixup=1.0), 6)
    for batch in given:
        mix = batch["mix"][:, None, None, None]
        own = arrays["x"][batch["index"]].astype(np.float32)
        other = np.roll(own, 1, axis=0)
        np.testing.assert_allclose(batch["x"], mix * own + (1 - mix) * other)
        np.testing.assert_array_equal(
            batch["partner_label"], np.roll(batch["label"], 1)
        )
    assert len({float(batch["mix"][0]) for batch in given}) == len(given)


STATISTICS = Statistics(np.array([128.0], np.float32), np.array([64.0], np.float32))
RGB = Statistics(np.full(3, 128.0, np.float32), np.full(3, 64.0, np.float32))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet8x4", 1_233_540),
        ("resnet20", 278_324),
        ("wrn_16_2", 703_284),
        ("wrn_40_2", 2_255_156),
    ],
)
def test_networks_have_the_sizes_of_repdistiller(name, parameters):
    net = nnx.eval_shape(lambda: maker(name)((32, 32, 3), 100, rngs=nnx.Rngs(0)))
    params = jax.tree.leaves(nnx.state(net, nnx.Param))
    assert sum(leaf.size for leaf in params) == parameters


@pytest.mark.parametrize("name", ["cnn", "mlp", "vit", "resnet8", "wrn_10_1"])
def test_networks_show_their_maps(name):
    net = nnx.eval_shape(lambda: maker(name)((9, 7, 1), 5, rngs=nnx.Rngs(0)))
    shown = nnx.eval_shape(lambda net: net(jnp.zeros((2, 9, 7, 1))), net)
    assert shown.logits.shape == (2, 5)
    assert shown.features["embedding"].ndim == 2
    stages = 2 if name == "mlp" else 3
    for stage in range(stages):
        after = shown.features[f"stages/{stage}"]
        assert after.ndim == 4
        assert shown.features[f"stages/{stage}/preactivation"].shape == after.shape
    assert len(shown.features) == 1 + 2 * stages + (name == "vit")


@pytest.mark.slow
def test_a_transformer_is_evaluated_by_both_of_its_heads():
    net = network("vit", (9, 7, 1), 5, STATISTICS, seed=0)
    assert net.has_distillation_token
    batch = {"x": jnp.zeros((2, 9, 7, 1), jnp.uint8)}
    arrays = net.adapted.params, net.adapted.model_state
    trained, evaluated = (
        net.adapted.model.apply(*arrays, batch, rng=jax.random.key(0), train=train)[0]
        for train in (True, False)
    )
    other = trained.features["distillation"]
    assert not np.allclose(trained.logits, other)
    both = (trained.logits + other) / 2
    np.testing.assert_allclose(evaluated.logits, both, atol=1e-5)


def test_the_student_is_small():
    net = network("cnn", (28, 28, 1), 10, STATISTICS, seed=0)
    assert sum(leaf.size for leaf in jax.tree.leaves(net.adapted.params)) == 9_170


@pytest.mark.parametrize("name", ["resnet9", "resnet2", "wrn_40", "wrn_16_0", "vgg"])
def test_other_networks_are_refused(name, capsys):
    with pytest.raises(SystemExit):
        main([f"--student={name}"])
    told = capsys.readouterr().err
    assert "--student" in told
    assert "cnn_large" in told


@pytest.fixture(scope="module")
def pair():
    return [network(name, LARGER, CLASSES, STATISTICS, seed=0) for name in NETS]


NETS = ("cnn", "cnn_large")


def setup_of(student, teacher, **changed):
    def margins():
        shown = jax.eval_shape(
            lambda: teacher.adapted.model.apply(
                *teacher.adapted[1:], batch_of(2), rng=None, train=False
            )[0]
        ).features
        widths = [shown[f"stages/{n}"].shape[-1] for n in range(teacher.stages)]
        return [jnp.full(width, -0.1) for width in widths]

    options = dict(examples=32, steps=24, mixup=False, margins=margins)
    return Setup(student, teacher, **options | changed)


def batch_of(count):
    rng = np.random.default_rng(0)
    return {
        "x": rng.integers(0, 256, (count, *LARGER)).astype(np.uint8),
        "label": np.arange(count, dtype=np.int32) % CLASSES,
        "index": np.arange(count, dtype=np.int32),
        "partner_label": np.arange(count, dtype=np.int32)[::-1] % CLASSES,
        "mix": np.full(count, 0.7, np.float32),
    }


def one_step(name, setup, batch=None):
    """Metrics of a step, and how far the student's parameters moved."""
    teacher, frozen = teachers.frozen(setup.teacher.adapted)
    student = setup.student.adapted
    parts = teacher, objective(name, setup), optax.sgd(0.01)
    batch = batch_of(8) if batch is None else batch
    state = init_state(
        student, *parts, frozen=frozen, batch=batch, rng=jax.random.key(0)
    )
    state, metrics = jax.jit(make_train_step(student.model, *parts))(
        state, frozen, batch
    )
    moved = jax.tree.map(
        lambda new, old: float(jnp.abs(new - old).max()),
        state.params["student"],
        student.params,
    )
    return {key: float(mean.value()) for key, mean in metrics.items()}, moved


def test_teacher_and_student_see_the_same_view():
    # The same network without statistics of its batch: only a view could differ.
    both = network("mlp", SHAPE, CLASSES, STATISTICS, seed=0)
    _, given = viewed(Augmentation(padding=2), 24)
    metrics, _ = one_step("kd", setup_of(both, both), given[0])
    assert metrics["soft"] == 0
    assert metrics["hard"] > 0


FAST = {"at"}


@pytest.mark.parametrize(
    "name",
    rest_slow(
        [name for name in [*METHODS, "rkd+kd"] if name != "deit"],
        lambda name: name in FAST,
    ),
)
def test_a_step_by_every_method(name, pair):
    metrics, moved = one_step(name, setup_of(*pair))
    assert np.isfinite(list(metrics.values())).all()
    assert metrics["skipped"] == 0
    assert metrics["loss"] > 0
    terms = set(metrics) - {"loss", "grad_norm", "skipped"}
    assert len(terms) > (name != ALONE)
    assert min(jax.tree.leaves(moved)) >= 0
    assert moved["head"]["kernel"] > 0


@pytest.mark.slow
def test_a_step_of_a_transformer_with_its_token(pair):
    student = network("vit", LARGER, CLASSES, STATISTICS, seed=0)
    _, moved = one_step("deit", setup_of(student, pair[1]))
    assert moved["distillation_head"]["kernel"] > 0
    _, moved = one_step(ALONE, setup_of(student, pair[1]))
    assert moved["distillation_head"]["kernel"] == 0


def test_methods_that_do_not_fit_are_refused(pair):
    with pytest.raises(Unfit, match="--student vit"):
        objective("deit", setup_of(*pair))
    with pytest.raises(Unfit, match="dkd reads one label"):
        objective("dkd", setup_of(*pair, mixup=True))
    dense = network("mlp", LARGER, CLASSES, STATISTICS, seed=0)
    for name in ("at", "nst", "ft", "cwd"):
        with pytest.raises(Unfit, match=f"{name} compares .* those of mlp and cnn"):
            objective(name, setup_of(dense, pair[1]))


def test_mixed_labels_count_by_their_shares(pair):
    term = objective(ALONE, setup_of(*pair, mixup=True))
    logits, batch = jnp.eye(4), jax.tree.map(jnp.asarray, batch_of(4))
    batch["partner_label"] = jnp.array([1, 0, -100, 2])
    outputs = Outputs(logits)
    terms, _ = term.apply({}, {}, outputs, outputs, batch, jnp.array(0))
    wrong = np.log(np.e + 3)
    assert terms["hard"].mean.count == 3
    expected = 0.7 * (wrong - 1) + 0.3 * wrong
    np.testing.assert_allclose(terms["hard"].mean.value(), expected, rtol=1e-6)


def test_names_of_methods():
    assert chosen(["kd,at", "at+kd"]) == ["alone", "kd", "at", "at+kd"]
    assert chosen(["all"]) == list(METHODS)
    for name in ("kd+kd", "nothing", "at+dkd"):
        with pytest.raises(ValueError, match=r"--methods: .*reviewkd"):
            chosen([name])


TINY = {
    # They compile in no time.
    "student": "mlp",
    "teacher-model": "mlp",
    "labels": 32,
    "seeds": 1,
    "epochs": 1,
    "teacher-epochs": 1,
    "batch-size": 8,
    "validation": 16,
    "evaluations": 2,
    "padding": 1,
}


def arguments(folder, **changed):
    options = TINY | {name.replace("_", "-"): value for name, value in changed.items()}
    given = [f"--{name}={value}" for name, value in options.items()]
    return [f"--data-dir={folder / 'set'}", f"--out={folder / 'out'}", *given]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    write_set(folder / "set")
    assert main(arguments(folder, methods="kd")) == 0
    return folder


def test_table_page_and_numbers(finished):
    out = finished / "out"
    table = (out / "results.md").read_text()
    assert len(table.splitlines()) == 2 + 3
    results = json.loads((out / "results.json").read_text())
    assert set(results["methods"]) == {"alone", "kd"}
    for method in results["methods"].values():
        (run,) = method["runs"]
        assert 0 <= run["scores"]["student_accuracy"] <= 1
        assert run["best_step"] in (2, 4)
        assert method["timing"]["ratio"] > 0
    assert results["methods"]["alone"]["gains"] == [0]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)


def test_evaluations_are_recorded_with_their_test_accuracy(finished):
    lines = (finished / "out/kd/seed-0/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["kind"] for record in records} == {"train", "eval"}
    evaluated = [record for record in records if record["kind"] == "eval"]
    assert [record["step"] for record in evaluated] == [2, 4]
    assert all("test_accuracy" in record for record in evaluated)


def test_a_method_that_diverges_leaves_the_others(finished, monkeypatch, capsys):
    nan = objectives.soft_labels(name="wild", weight=lambda step: jnp.nan * step)
    monkeypatch.setitem(METHODS, "wild", lambda setup: nan)
    for _ in range(2):  # started again it has diverged too
        assert main(arguments(finished, methods="wild,kd")) == 1
        assert "wild diverged, as told above" in capsys.readouterr().err
        results = json.loads((finished / "out/results.json").read_text())
        assert set(results["methods"]) == {"alone", "kd"}
        assert "wild diverged with seed 0: step 3" in results["diverged"]["wild"]
        assert results["findings"][-1] == results["diverged"]["wild"]
    assert "wild diverged with" in (finished / "out/report.html").read_text()


@pytest.mark.slow
def test_partly_finished_it_does_only_what_is_missing(finished, capsys):
    out = finished / "out"
    names = ("metrics.jsonl", "test_logits.npy", "result.json")
    before = {name: (out / "kd/seed-0" / name).read_bytes() for name in names}
    (out / "kd/seed-0/result.json").unlink()
    assert main(arguments(finished, methods="kd")) == 0
    printed = capsys.readouterr().out
    assert "student 1 of 1: kd, seed 0" in printed
    for name in names[:2]:
        assert (out / "kd/seed-0" / name).read_bytes() == before[name], name
    assert main(arguments(finished, methods="kd")) == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("labels", "33", r"got 33 for 4 classes; .* a multiple of 4, at most \d+"),
        ("labels", "4000", "at most"),
        ("batch-size", "30", "multiple of the 8 device"),
        ("batch-size", "64", "at most 32"),
        ("validation", "96", "expected 1 to 95"),
        ("teacher", "nowhere", "found no checkpoint in nowhere"),
        ("methods", "deit", "--student vit"),
        ("flip", "no", "holds runs with other settings"),
    ],
)
def test_refused_before_anything_is_trained(finished, option, value, told, capsys):
    given = arguments(finished, methods="kd")
    given = [each for each in given if not each.startswith(f"--{option}=")]
    given.append("--no-flip" if option == "flip" else f"--{option}={value}")
    assert main(given) == 2
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("seeds", "0", "at least 1"),
        ("learning-rate", "nan", "above 0"),
        ("mixup", "-1", "at least 0"),
        ("methods", "distill", "reviewkd"),
        ("optimizer", "lamb", "adamw"),
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

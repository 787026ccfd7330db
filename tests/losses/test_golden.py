"""Values and gradients that published implementations gave, see tests/golden."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import losses
from tests.losses import golden_relations
from tests.losses.running import AS_FOR_USERS
from tests.marks import rest_slow

GOLDEN = Path(__file__).parent.parent / "golden"
ARRAYS = np.load(GOLDEN / "cases.npz")
CASES = {case["case"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}


def temperature_of(hyper):
    return hyper.get("temperature", hyper.get("tau", 1.0))


def logits(inputs):
    return inputs["student_logits"], inputs["teacher_logits"]


def divergence(name, renamed=None, *, factor=False):
    """A divergence with the published names of its numbers.

    ``factor`` says that the published value carries temperature², as kdjax' always
    does; where it does not, it is divided out.
    """

    def rows(inputs, hyper):
        temperature = temperature_of(hyper)
        numbers = {ours: of(hyper) for ours, of in (renamed or {}).items()}
        value = getattr(losses, name)(
            *logits(inputs), temperature=temperature, **numbers
        )
        return value if factor else value / temperature**2

    return rows


def jensen_shannon(inputs, hyper):
    # DistiLLM's lam is the student's share. TRL switches to the KLs at the ends.
    beta = hyper.get("beta", 1 - hyper.get("lam", 0))
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    if beta in ends:
        return divergence(ends[beta])(inputs, hyper)
    return divergence("jensen_shannon", {"beta": lambda _: beta})(inputs, hyper)


def symmetric_kl(inputs, hyper):
    # torchtune weighs the forward KL, DistiLLM the reverse one.
    weight = hyper["lam"] if "lam" in hyper else 1 - hyper["sym_kd_ratio"]
    return divergence("symmetric_kl", {"reverse_weight": lambda _: weight})(
        inputs, hyper
    )


def decoupled_kd(inputs, hyper):
    return losses.decoupled_kd(*logits(inputs), inputs["labels"], **hyper)


def dist(inputs, hyper):
    settings = {"temperature": hyper["tau"]}
    rows = losses.inter_class_relation(*logits(inputs), **settings)
    columns = losses.intra_class_relation(*logits(inputs), **settings)
    value = hyper["beta"] * rows.mean() + hyper["gamma"] * columns.mean()
    return hyper["tau"] ** 2 * value


def norms(probabilities, axis):
    centred = probabilities - probabilities.mean(axis, keepdims=True)
    return jnp.sqrt(jnp.sum(centred**2, axis))


def dist_of_mmrazor(inputs, hyper):
    """DIST with 1e-8 added to the product of the norms, which the paper has not."""
    settings = {"temperature": hyper["tau"]}
    q, p = (jax.nn.softmax(z / hyper["tau"]) for z in logits(inputs))
    total = 0.0
    for weight, axis, relation in (
        (hyper["beta"], 1, losses.inter_class_relation),
        (hyper["gamma"], 0, losses.intra_class_relation),
    ):
        length = norms(q, axis) * norms(p, axis)
        correlation = 1 - relation(*logits(inputs), **settings)
        total += weight * (1 - correlation * length / (length + 1e-8)).mean()
    return hyper["tau"] ** 2 * total


def logit_standardization(inputs, hyper):
    student, teacher = map(losses.standardize_logits, logits(inputs))
    return losses.forward_kl(student, teacher, temperature=hyper["temperature"])


def weighted_soft_labels(inputs, hyper):
    value = losses.weighted_soft_labels(
        *logits(inputs), inputs["labels"], temperature=hyper["tau"]
    )
    return hyper["loss_weight"] * value


def hard_distillation(inputs, hyper):
    # DeiT's alpha weighs the distillation; it has a second head of its own.
    student = inputs.get("student_dist_logits", inputs["student_logits"])
    value = hyper["alpha"] * losses.hard_distillation(student, inputs["teacher_logits"])
    if "labels" in inputs:
        hard = losses.cross_entropy(inputs["student_logits"], inputs["labels"])
        value += (1 - hyper["alpha"]) * hard
    return value


def logit_mse(inputs, hyper):
    student, teacher = logits(inputs)
    temperature = hyper["temperature"]
    return losses.logit_mse(student / temperature, teacher / temperature)


def top_k(inputs, scores):
    return jnp.take_along_axis(scores, inputs["teacher_ids"], -1)


def pairs(inputs):
    """How many ordered pairs there are at each position that counts."""
    teacher = inputs["teacher_logprobs"]
    ordered = teacher[..., :, None] > teacher[..., None, :]
    return ordered.sum((-2, -1)) * inputs["mask"]


def over_all_pairs(inputs, rows):
    # DistillKit divides by all the pairs of the batch and 1e-8 or 1e-9.
    return (rows * pairs(inputs)).sum() / pairs(inputs).sum()


def pairwise_hinge(inputs, hyper):
    student = top_k(inputs, jax.nn.softmax(inputs["student_logits"]))
    teacher = jnp.exp(inputs["teacher_logprobs"])
    rows = losses.pairwise_hinge(student, teacher, margin=hyper["margin"])
    return over_all_pairs(inputs, rows)


def logistic_ranking(inputs, hyper):
    student = top_k(inputs, inputs["student_logits"])
    rows = losses.logistic_ranking(student, inputs["teacher_logprobs"])
    return over_all_pairs(inputs, rows)


def maps(inputs, *names):
    """The maps of those names, which are NCHW there, channels last."""
    return [jnp.moveaxis(inputs[name], 1, -1) for name in names]


def feature(name, of=lambda hyper: {}):
    """A loss over the maps of student and teacher, one value per example."""

    def rows(inputs, hyper):
        student, teacher = maps(inputs, "student_feature", "teacher_feature")
        return getattr(losses, name)(student, teacher, **of(hyper))

    return rows


def feature_mse(inputs, hyper):
    return feature("feature_mse")(inputs, hyper).mean((1, 2))


def solution_flow(inputs, hyper):
    student = maps(inputs, "student_feature_0", "student_feature_1")
    teacher = maps(inputs, "teacher_feature_0", "teacher_feature_1")
    return losses.solution_flow(tuple(student), tuple(teacher))


def activation_boundary(inputs, hyper):
    # RepDistiller's constant.
    value = feature("activation_boundary", lambda h: {"margin": float(h["margin"])})
    return 3 / 1000 * value(inputs, hyper)


def variational_information(inputs, hyper):
    mean, target = maps(inputs, "student_feature", "teacher_feature")
    layers = [inputs[name] for name in ("w1", "w2", "w3") if name in inputs]
    for layer in layers:
        mean = jnp.matmul(mean, layer.T, precision="highest")
        mean = mean if layer is layers[-1] else jax.nn.relu(mean)
    return losses.variational_information(mean, inputs["log_scale"], target)


def hierarchical_context(inputs, hyper):
    pairs = [
        maps(inputs, f"student_feature_{level}", f"teacher_feature_{level}")
        for level in range(hyper["levels"])
    ]
    return sum(losses.hierarchical_context(*pair) for pair in pairs)


def channel_similarity(inputs, hyper):
    # torchdistill divides by the size of the batch once more.
    rows = feature("channel_similarity")(inputs, hyper)
    return rows / len(rows)


def hidden(name):
    def rows(inputs, hyper):
        student, teacher = inputs["student_hidden"], inputs["teacher_hidden"]
        return getattr(losses, name)(student, teacher)

    return rows


def hidden_gram_mse(inputs, hyper):
    """TextBrewer's, the flow between states with tokens as channels.

    It averages over the pairs of tokens that are valid in the whole batch.
    """
    mask = inputs.get("mask", jnp.ones(inputs["student_hidden_0"].shape[:2], int))

    def layers(side):
        states = [inputs[f"{side}_hidden_{layer}"] for layer in (0, 1)]
        states = [jnp.where(mask[..., None] == 1, each, 0) for each in states]
        return tuple(each.mT[:, None] for each in states)

    rows = losses.solution_flow(layers("student"), layers("teacher"))
    length = mask.shape[1]
    return jnp.sum(rows * length**2) / jnp.sum(mask.sum(1) ** 2)


def _named(name):
    return lambda hyper: hyper[name]


# The golden name of a loss, and the same in kdjax: one value per position, or the
# whole value where positions are related.
TABLE = {
    "kd": divergence("forward_kl", factor=True),
    "forward_kl": divergence("forward_kl", factor=True),
    "reverse_kl": divergence("reverse_kl"),
    "symmetric_kl": symmetric_kl,
    "generalized_jsd": jensen_shannon,
    "skew_forward_kl": divergence("skew_kl", {"skew": _named("lam")}),
    "skew_reverse_kl": divergence("skew_reverse_kl", {"skew": _named("lam")}),
    "tvd": divergence("total_variation"),
    # DSKD's alpha is the mass of the tail.
    "adaptive_kl": divergence("adaptive_kl", {"head_mass": lambda h: 1 - h["alpha"]}),
    "alpha_beta_divergence": divergence(
        "alpha_beta", {"alpha": _named("alpha"), "beta": _named("beta")}
    ),
    "soft_cross_entropy": divergence("soft_cross_entropy"),
    "dkd": decoupled_kd,
    "dist": dist,
    "logit_standardization_kd": logit_standardization,
    "wsld": weighted_soft_labels,
    "hard_label_distillation": hard_distillation,
    "logit_mse": logit_mse,
    "hinge_ranking": pairwise_hinge,
    "logistic_ranking": logistic_ranking,
    "uld": lambda inputs, hyper: losses.universal_logit(*logits(inputs)),
    **golden_relations.TABLE,
    "fitnet_mse": feature_mse,
    "attention_transfer": feature("attention_transfer"),
    "factor_transfer": feature("factor_transfer"),
    "nst": feature("neuron_selectivity"),
    "fsp": solution_flow,
    "activation_boundary": activation_boundary,
    "vid": variational_information,
    "reviewkd_hcl": hierarchical_context,
    "cwd": feature("channel_distribution", lambda h: {"temperature": float(h["tau"])}),
    "pkd_pearson": feature("feature_correlation"),
    "ickd_chsim": channel_similarity,
    "hidden_mse": hidden("feature_mse"),
    "hidden_cosine": hidden("feature_cosine"),
    "hidden_gram_mse": hidden_gram_mse,
}

# Single cases of a peer that differs from its paper.
PEERS = {"dist__mmrazor__b1_g1_T4_B32_C60": dist_of_mmrazor}

# Published values that leave the teacher's entropy in: compared without it.
ENTROPY_KEPT = {"forward_kl", "symmetric_kl", "skew_forward_kl"}

NAMES = [name for name, case in CASES.items() if case["loss"] in TABLE]


def reduce(rows, inputs, case):
    """The published reduction of the values of positions."""
    if rows.ndim == 0:
        return rows
    if "mask" in inputs and case["has_rows"] and "hidden" in case["loss"]:
        return rows.mean(where=inputs["mask"] == 1)
    if "labels" not in inputs or case["reduction"].startswith("mean over rows"):
        return rows.mean()
    total = rows.sum(where=inputs["labels"] >= 0)
    if case["reduction"].startswith("sum over valid"):
        return total
    hyper = case["hyperparameters"]
    count = hyper.get("num_batch_labels") or hyper.get("num_items_in_batch")
    return total / (count or jnp.maximum((inputs["labels"] >= 0).sum(), 1))


def inputs_of(case, dtype):
    inputs = {name: ARRAYS[f"{case['case']}/in/{name}"] for name in case["inputs"]}
    return {
        name: jnp.asarray(array, dtype if array.dtype == np.float32 else None)
        for name, array in inputs.items()
    }


def assert_matches(name, dtype, tolerance, options=None):
    case = CASES[name]
    expression = PEERS.get(name, TABLE[case["loss"]])
    inputs = inputs_of(case, dtype)
    moved = {argument: inputs[argument] for argument in case["differentiable"]}

    def value(moved):
        here = {**inputs, **moved}
        rows = expression(here, case["hyperparameters"])
        return reduce(rows, here, case), rows

    run = jax.jit(jax.value_and_grad(value, has_aux=True), compiler_options=options)
    (got, rows), gradients = run(moved)

    corrected = case["has_entropy_corrected"] and case["loss"] in ENTROPY_KEPT
    expected = ARRAYS[
        f"{name}/out/value_entropy_corrected" if corrected else f"{name}/out/value"
    ]
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance**2)
    if case["has_rows"] and not corrected:
        # Rows without a label are 0 there; here the mask is the caller's.
        # Labels that are no integers are a teacher's scores.
        labels = inputs.get("labels", np.zeros(()))
        counts = labels >= 0 if labels.dtype == np.int32 else True
        expected = ARRAYS[f"{name}/out/rows"]
        if case["loss"] == "cwd":  # one value per channel there
            expected = expected.mean(-1)
        if case["loss"].startswith("hidden"):
            counts = inputs["mask"] == 1
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            np.where(counts, rows, 0), expected, rtol=tolerance, atol=tolerance * scale
        )
    for argument, gradient in gradients.items():
        expected = ARRAYS[f"{name}/out/grad/{argument}"]
        # The relative error of a vector; a gradient of 0 must be 0. Single entries may
        # be off by twice as much of the largest one: with logits of 10, float32 knows
        # x = log p - log q to no better than half a millionth.
        error = np.asarray(gradient, np.float64) - expected
        assert np.linalg.norm(error) <= tolerance * np.linalg.norm(expected)
        assert np.abs(error).max() <= 2 * tolerance * np.abs(expected).max()


FIRST_OF_LOSS = set({CASES[name]["loss"]: name for name in reversed(NAMES)}.values())


@pytest.mark.parametrize("name", rest_slow(NAMES, lambda name: name in FIRST_OF_LOSS))
def test_float32(name):
    # Sums are less exact where the compiler leaves them to one number at a time.
    assert_matches(name, jnp.float32, 1e-6, AS_FOR_USERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_float64(name):
    with jax.enable_x64(True):
        assert_matches(name, jnp.float64, 1e-9)


def test_table_is_complete():
    """Every golden loss is mapped here, or belongs to a family that is named here."""
    elsewhere = {
        *("fused_linear_jsd", "fused_linear_cosine"),  # tests/fused
        *golden_relations.NOT_FOLLOWED,
    }
    assert {case["loss"] for case in CASES.values()} - elsewhere == set(TABLE)
    assert len(NAMES) == 103


@pytest.mark.parametrize("size", ["single", "batch"])
def test_cpp_single_loss(size):
    golden = json.loads((GOLDEN / "cpp_single_loss.json").read_text())
    example = golden[size]
    with jax.enable_x64(True):
        rows = losses.knowledge_distillation(
            jnp.asarray(example["student_logits"], jnp.float64),
            jnp.asarray(example["teacher_logits"], jnp.float64),
            jnp.asarray(example["labels"]),
            alpha=golden["hyperparameters"]["alpha"],
            temperature=golden["hyperparameters"]["tau"],
        )
        # The program adds 1e-12 inside its logarithms, the definition does not.
        np.testing.assert_allclose(rows.mean(), example["loss"], atol=1e-9)
        expected = example["loss_from_definition_float64"]
        np.testing.assert_allclose(rows.mean(), expected, rtol=1e-12)

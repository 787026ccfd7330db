"""What preflight says of a step, beside what follows from its shapes."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import optax
import pytest

from kdjax import make_train_step, models, objectives, teachers
from kdjax.tools import preflight
from kdjax.tools.preflight import Levers, Plan, Trial
from kdjax.tools.preflight import _check as checking
from kdjax.train import init_state, make_mesh
from kdjax.train.chips import Chip, chip_of

EXAMPLES, WIDTH, LAYERS, NARROW = 64, 64, 3, 24


def layers(params, batch, *, unroll=1):
    """Square layers, one after the other in a loop."""

    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    x, _ = jax.lax.scan(
        layer, batch["x"] @ params["in"], params["layers"], unroll=unroll
    )
    return x @ params["out"]


def shapes(width):
    sizes = {"in": (WIDTH, width), "layers": (LAYERS, width, width), "out": (width, 8)}
    return {
        name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()
    }


def plan(mesh=None, levers=Levers(accumulate=1), *, unroll=1):  # noqa: B008
    """One step of a student of three layers under a narrow teacher."""
    apply = functools.partial(layers, unroll=unroll)
    student = models.from_apply(apply, shapes(WIDTH))
    teacher, frozen = teachers.frozen(models.from_apply(apply, shapes(NARROW)))
    parts = teacher, objectives.soft_labels(), optax.adam(1e-3)
    batch = {"x": jax.ShapeDtypeStruct((EXAMPLES, WIDTH), jnp.float32)}

    def initial(params, frozen, batch):
        net, key = student._replace(params=params), jax.random.key(0)
        return init_state(net, *parts, frozen=frozen, batch=batch, rng=key)

    state = jax.eval_shape(initial, student.params, frozen, batch)
    dtype = jnp.dtype(levers.teacher_dtype)
    frozen = jax.tree.map(lambda leaf: leaf.update(dtype=dtype), frozen)
    step = make_train_step(student.model, *parts, accumulate=levers.accumulate)
    split = mesh is not None and "fsdp" in mesh.axis_names
    rules = (
        [("layers", jax.sharding.PartitionSpec(None, None, "fsdp"))] if split else ()
    )
    return Plan(step, state, frozen, batch, rules)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def report(devices=8):
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        devices=jax.devices()[:devices],
        axis_types=(jax.sharding.AxisType.Auto,),
    )
    return preflight.check(plan(), mesh)


def test_loops_count_as_often_as_they_run():
    # Forward 2 N an example, and backward 4 N but by the inputs, which none asks for.
    student = 6 * size(shapes(WIDTH)) - 2 * WIDTH * WIDTH
    costs = report().costs
    assert costs.student_flops == student * EXAMPLES / 8
    assert costs.teacher_flops == 2 * size(shapes(NARROW)) * EXAMPLES / 8
    assert costs.unknown_loops == 0


@pytest.mark.slow
def test_loops_count_as_what_they_unroll_to():
    unrolled = preflight.check(plan(unroll=LAYERS), make_mesh()).costs
    assert unrolled.teacher_flops == report().costs.teacher_flops
    assert unrolled.student_flops == report().costs.student_flops


def test_one_device_does_what_eight_share():
    assert report(1).costs.flops == 8 * report().costs.flops
    assert report(1).costs.collectives == ()


def test_gradients_are_summed_once():
    summed = [each for each in report().costs.collectives if each.payload > 64]
    assert {each.kind for each in summed} == {"all-reduce"}
    # The loss goes with them.
    payload = sum(each.payload * each.times for each in summed)
    assert payload == 4 * size(shapes(WIDTH)) + 4
    # Along a ring of eight, all but an eighth goes by twice.
    moved = sum(each.moved * each.times for each in summed)
    assert moved == pytest.approx(2 * payload * 7 / 8)


def test_memory_by_what_it_holds():
    memory = report().memory
    assert memory["student"] == 4 * size(shapes(WIDTH))
    assert memory["optimizer"] == 2 * memory["student"] + 4
    assert memory["teacher"] == 4 * size(shapes(NARROW))
    assert memory["batch"] == 4 * EXAMPLES * WIDTH / 8
    assert memory["activations"] > 4 * EXAMPLES / 8 * LAYERS * WIDTH
    assert report().peak == sum(memory.values())


def test_sharded_arrays_count_by_their_shards():
    split = plan()._replace(
        rules=[("layers", jax.sharding.PartitionSpec(None, "data"))]
    )
    found = preflight.check(split, make_mesh())
    whole, parts = report().memory["student"], found.memory["student"]
    assert whole - parts == 7 / 8 * 4 * LAYERS * WIDTH * WIDTH
    # Each layer is gathered inside of the loop over layers.
    gathers = [each for each in found.costs.collectives if each.kind == "all-gather"]
    assert {each.times for each in gathers} == {LAYERS}
    assert found.gathered(WIDTH)
    assert not found.gathered(7)


def test_products_and_convolutions():
    def products(x, kernel, image, filters):
        stride = {"window_strides": (2, 1), "rhs_dilation": (1, 2)}
        pixels = jax.lax.conv_general_dilated(image, filters, padding="VALID", **stride)
        return jnp.einsum("bij,bjk->bik", x, kernel), pixels

    given = [
        jnp.ones(sizes) for sizes in ((3, 4, 5), (3, 5, 6), (2, 3, 9, 11), (7, 3, 3, 4))
    ]
    text = jax.jit(products).lower(*given).compile().as_text()
    # Pixels: 4 rows of (9 - 3) // 2 + 1, 5 columns of 11 - (2 * 3 + 1) + 1.
    wanted = 2 * 3 * 4 * 5 * 6 + 2 * (2 * 7 * 4 * 5) * (3 * 3 * 4)
    assert preflight.costs(text).flops == wanted


def test_padding_is_not_counted():
    def padded(image, filters):
        return jax.lax.conv_general_dilated(image, filters, (1,), [(2, 2)])

    text = jax.jit(padded).lower(jnp.ones((1, 1, 4)), jnp.ones((1, 1, 3))).compile()
    # Six places of three, and one, two, three, three, two, one of them meet an input.
    assert preflight.costs(text.as_text()).flops == 2 * (1 + 2 + 3 + 3 + 2 + 1)


def test_products_that_a_gpu_leaves_to_a_library():
    numbers = '"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"]'
    text = f"""HloModule jit_f, num_partitions=4

ENTRY %main (a: bf16[3,4,5], b: bf16[3,5,6]) -> bf16[3,4,6] {{
  %a = bf16[3,4,5]{{2,1,0}} parameter(0)
  %b = bf16[3,5,6]{{2,1,0}} parameter(1)
  %both = (bf16[3,4,6]{{2,1,0}}, s8[99]{{0}}) custom-call(%a, %b), \
custom_call_target="__cublas$gemm", metadata={{op_name="jit(f)/teacher/dot_general"}}, \
backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{{numbers}}}}}}}
  ROOT %product = bf16[3,4,6]{{2,1,0}} get-tuple-element(%both), index=0
}}
"""
    assert preflight.costs(text).teacher_flops == 2 * 3 * 4 * 5 * 6
    assert preflight.costs(text.replace("teacher", "my_teacher")).teacher_flops == 0


def test_what_goes_on_in_a_thread_of_its_own_counts_once():
    text = """HloModule jit_f, num_partitions=4

%sent (a: f32[8]) -> f32[32] {
  %a = f32[8]{0} parameter(0)
  ROOT %all = f32[32]{0} all-gather(%a), channel_id=1, replica_groups=[1,4]<=[4]
}, execution_thread="sparsecore"

ENTRY %main (b: f32[8]) -> f32[32] {
  %b = f32[8]{0} parameter(0)
  %start = ((f32[8]{0}), f32[32]{0}, u32[]) async-start(%b), calls=%sent
  %going = ((f32[8]{0}), f32[32]{0}, u32[]) async-update(%start), calls=%sent
  ROOT %done = f32[32]{0} async-done(%going), calls=%sent
}
"""
    (found,) = preflight.costs(text).collectives
    assert (found.kind, found.times, found.payload) == ("all-gather", 1, 4 * 32)
    assert found.moved == 4 * 32 * 3 / 4


def test_loops_that_end_by_their_data_are_told():
    def halved(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x / 2, x)

    costs = preflight.costs(jax.jit(halved).lower(jnp.ones((8, 8))).compile().as_text())
    assert costs.unknown_loops == 1
    assert costs.flops == 2 * 8**3


def test_traffic_is_near_the_compilers_own():
    def chain(x, kernel):
        return jnp.sort(jax.nn.softmax(x @ kernel)) + x[3:4]

    compiled = (
        jax.jit(chain).lower(jnp.ones((256, 256)), jnp.ones((256, 256))).compile()
    )
    own = compiled.cost_analysis()["bytes accessed"]
    assert preflight.costs(compiled.as_text()).traffic == pytest.approx(own, rel=0.1)


@pytest.fixture
def small_chip(monkeypatch):
    """Says that each CPU device has so much memory."""

    def of(memory):
        chip = Chip(memory, bandwidth=1e9, flops=1e12, links=1e8)
        monkeypatch.setattr(checking, "chip_of", lambda kind: chip)

    return of


def test_what_bounds_a_step_is_told(small_chip):
    small_chip(report().peak)
    trial = Trial("", report().mesh, Levers(), report())
    assert trial.report.fits
    assert preflight.verdict([trial]) == "8 x cpu: it fits."
    slowest = max(report().seconds, key=report().seconds.get)
    notes = {name: note for name, _, note in preflight.table(report()).rows}
    assert notes[f"time for {slowest}"] == "bounds the step"
    assert notes["peak memory"].startswith("100% of ")


def test_memory_that_is_not_known_is_told():
    trial = Trial("", report().mesh, Levers(), report())
    assert (report().fits, report().seconds) == (None, {})
    assert preflight.verdict([trial]).endswith("its memory is not known.")


def test_levers_are_moved_until_it_fits(small_chip):
    memory = report().memory
    held = sum(memory[name] for name in ("student", "optimizer", "teacher", "batch"))
    small_chip(held - memory["teacher"] // 2)
    *before, last = preflight.recommend(plan, make_mesh, {"data": 8})
    assert [trial.changed for trial in before] == ["", "teacher in bfloat16"]
    assert [trial.report.fits for trial in (*before, last)] == [False, False, True]
    assert (last.changed, last.axes) == ("fsdp 8 ways", {"fsdp": 8})
    assert last.report.memory["teacher"] * 2 == memory["teacher"]
    assert last.report.memory["student"] < memory["student"]
    said = preflight.verdict([*before, last])
    assert "it fits with teacher in bfloat16, fsdp 8 ways" in said
    drawn = preflight.figure([*before, last])
    assert sum(bar.get_width() for bar in drawn.axes[0].patches) * 2**30 == (
        pytest.approx(sum(trial.report.peak for trial in (*before, last)))
    )


def test_nothing_fits(small_chip):
    small_chip(100)
    trials = list(preflight.recommend(plan, make_mesh, {"data": 8}))
    assert {trial.report.fits for trial in trials} == {False}
    assert all(trial.report.costs is None for trial in trials)
    assert trials[-1].axes == {"fsdp": 8}
    assert trials[-1].levers.remat
    more = "take more chips or a smaller batch."
    assert f"does not fit; {more}" in preflight.verdict(trials[:1])
    assert "does not fit, even with teacher in bfloat16" in preflight.verdict(trials)
    assert preflight.verdict(trials).endswith(f"; {more}")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
@pytest.mark.parametrize(
    ("topology", "chips"), [("v4:2x2x2", 8), ("v5e:4x4", 16), ("v5p:2x2x1", 4)]
)
def test_a_slice_has_a_device_for_each_chip(topology, chips):
    mesh = preflight.slice_mesh(topology)
    assert dict(mesh.shape) == {"data": chips}
    assert chip_of(mesh.devices.flat[0].device_kind) is not None
    with pytest.raises(ValueError, match=f"is for 3 chips, but {topology} has {chips}"):
        preflight.slice_mesh(topology, {"data": 3})


def test_a_mesh_that_a_slice_has_not_is_refused():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="cannot be laid over v5p:4x4x4; expected"):
        preflight.slice_mesh("v5p:4x4x4", {"fsdp": 8, "tensor": 8})


def test_an_unknown_slice_is_refused():
    with pytest.raises(ValueError, match="topology: got 'v99:4x4'; expected one such"):
        preflight.slice_mesh("v99:4x4")

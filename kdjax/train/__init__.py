"""Training: the state, the step, its placement on a mesh, evaluation and the loop."""

from kdjax.train.evaluation import evaluate, make_eval_step
from kdjax.train.loop import FitResult, fit
from kdjax.train.mapped import pmap_step, shard_map_step
from kdjax.train.profiling import Trace, token_flops
from kdjax.train.rules import largest_axes, shardings
from kdjax.train.sharding import (
    batch_axes,
    make_mesh,
    make_placed,
    place,
    place_batch,
    place_step,
)
from kdjax.train.state import DistillState, init_state
from kdjax.train.step import make_train_step

__all__ = [
    "DistillState",
    "FitResult",
    "Trace",
    "batch_axes",
    "evaluate",
    "fit",
    "init_state",
    "largest_axes",
    "make_eval_step",
    "make_mesh",
    "make_placed",
    "make_train_step",
    "place",
    "place_batch",
    "place_step",
    "pmap_step",
    "shard_map_step",
    "shardings",
    "token_flops",
]

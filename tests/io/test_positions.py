"""Positions in the data, read by other processes than wrote them."""

import json

import numpy as np
import pytest
from etils import epath

from kdjax.io._positions import Positions, RestorePosition
from kdjax.io.input import batches


def data():
    return batches({"x": np.arange(40)}, batch_size=4, seed=0)


def saved(folder, *positions):
    for number, position in enumerate(positions):
        path = folder / f"process_{number}-of-{len(positions)}.json"
        path.write_text(json.dumps({"next_index": position}))
    return epath.Path(folder)


@pytest.mark.parametrize("positions", [(3,), (3, 3), (3, 3, 3, 3)])
def test_one_process_goes_on_where_all_were(tmp_path, positions):
    iterator = data()
    Positions().restore(saved(tmp_path, *positions), args=RestorePosition(iterator))
    assert iterator.get_state() == {"next_index": 3}
    expected = data()
    for _ in range(3):
        next(expected)
    np.testing.assert_array_equal(next(iterator)["x"], next(expected)["x"])


def test_different_positions_are_refused(tmp_path):
    iterator = data()
    with pytest.raises(ValueError, match=r"batches: .* by 2 processes.* there are 1"):
        Positions().restore(saved(tmp_path, 3, 4), args=RestorePosition(iterator))
    assert iterator.get_state() == {"next_index": 0}

"""The examples of training steps."""

from itertools import combinations_with_replacement

import numpy as np
import pytest
from conftest import store_of

from bert_tickets.data.batches import Batches


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_lengths_are_those_of_the_batches_of_the_steps(rank, world_size):
    """Over epochs whose last batch is smaller; of all processes together."""
    store = store_of([*range(5, 25)])
    whole, batches = Batches(store, 6, 3), Batches(store, 6, 3, rank=rank, world_size=world_size)
    of_step = [whole.parts(step)[0].lengths for step in range(10)]
    assert [len(lengths) for lengths in of_step] == [6, 6, 6, 2] * 2 + [6, 6]
    for start, stop in combinations_with_replacement(range(11), 2):
        assert np.array_equal(batches.lengths(start, stop), np.concatenate([np.zeros(0, int), *of_step[start:stop]]))

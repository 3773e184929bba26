"""The losses of ten masked steps of every task, as computed once with padded batches of Hugging Face's own model."""

import json

import pytest
from golden import GOLDEN, cases, losses


def test_losses_equal_the_golden_ones(calm_bert_dir, glue_dir, squad_dir, corpus_dir):
    golden, found = json.loads(GOLDEN.read_text()), cases(calm_bert_dir, glue_dir, squad_dir, corpus_dir)
    assert set(golden) == set(found)
    for task, expected in golden.items():
        assert losses(*found[task], packed=True) == pytest.approx(expected, abs=2e-5), task

"""What may be one row: networks that were trained alike, and tickets that were found alike."""

import pytest
import rundirs
from test_importance_table import GOOD
from test_results import read, rows, values

from bert_tickets.errors import UserError
from bert_tickets.files import write_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.report.results import comparable
from bert_tickets.report.rows import FULL
from bert_tickets.report.tables import build


def test_level_0_with_another_decay_or_given_weights_is_no_full_bert(tmp_path):
    rundirs.run(tmp_path, [0.9], seed=1)
    rundirs.run(tmp_path, [0.8], seed=2, rewind="none", decay="once")
    rundirs.run(tmp_path, [0.7], seed=3, decay="run")
    rundirs.search(tmp_path, "sst2", 4, rundirs.units(*GOOD[1]), [0.6, 0.5], weights="w")
    rundirs.search(tmp_path, "sst2", 5, rundirs.units(*GOOD[1]), [0.8, 0.5])
    assert values(comparable(read(tmp_path)), FULL) == {1: 90.0, 5: 80.0}


def test_tickets_of_two_searches_in_one_row_are_refused(tmp_path):
    """Files of derived masks do not have the settings of their searches."""
    for seed, (threshold, kept) in enumerate(((0.9, "1101 0110"), (0.5, "1100 0110"))):
        found = rundirs.search(tmp_path, "mnli", 1, rundirs.units(kept, "11"), [0.84, 0.76], threshold=threshold)
        bad = rundirs.derived(tmp_path / f"{threshold}", rundirs.units(kept[::-1], "11"), "bad", "mnli", seed=1)
        rundirs.given(tmp_path, "mnli", 1, bad, 0.7 - seed / 10)
        assert found.is_dir()
    with pytest.raises(UserError, match=r"row importance bad ticket, seed 1\) have several tickets in one row"):
        build("importance", comparable(read(tmp_path)))


def test_masks_of_oneshot_are_named_by_what_was_ranked(tmp_path):
    for name, info in {
        "plain": {"init": "pretrained"},
        "random": {"init": "random"},
        "all": {"prunable": "layers+biases"},
    }.items():
        path = tmp_path / name
        rundirs.some_mask(0.5, name).write(path, method="oneshot magnitude", **info)
        rundirs.run(tmp_path, [0.7], mask=path)
    words = "oneshot magnitude"
    assert rows(read(tmp_path)) == {"one-shot pruning", f"{words} (init random)", f"{words} (prunable layers+biases)"}


def test_pre_trained_models_are_named_by_the_task_and_the_sparsity_of_their_level(tmp_path):
    text = rundirs.run(tmp_path, [0.5, 0.4, 0.4], "mlm", seed=1)
    other = rundirs.run(tmp_path, [0.8], "mnli", seed=1)
    for run, level in ((text, 0), (text, 2), (other, 0)):
        rundirs.run(tmp_path, [0.7], "rte", seed=level, levels=1, model=str(rundirs.pretrained(run, level)))
    names = {f"full BERT, pre-trained by imp{own}" for own in ("", " (sparsity 0.2)", " (task mnli)")}
    assert rows(read(tmp_path).query("task == 'rte'")) == names


def test_tickets_on_the_weights_that_their_search_trained_are_one_row_for_all_seeds(tmp_path):
    for seed in (1, 2):
        found = rundirs.run(tmp_path, [0.8, 0.7], seed=seed)
        trained = found / "level_01" / "weights.safetensors"
        write_tensors(trained, {"weight": rundirs.torch.zeros(1)}, {"run": found.name, "level": 1})
        mask = Mask.load(rundirs.mask_of(found, 1))
        Mask(dict(mask), {**mask.info, "run": found.name}).write(rundirs.mask_of(found, 1))
        rundirs.run(tmp_path, [0.75], seed=seed, mask=rundirs.mask_of(found, 1), init=trained)
    assert rows(read(tmp_path).query("given")) == {"imp ticket, its trained weights"}

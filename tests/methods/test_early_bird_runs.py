"""Runs of EarlyBERT: search, draw and training, killed and resumed (Chen et al. 2021)."""

import numpy as np
from trainrun import train

from bert_tickets.files import sha256_of
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import encoder_weights, head_weights
from bert_tickets.modeling.units import read_units
from bert_tickets.runs.directory import results
from bert_tickets.runs.integrity import problems

GLUE = "lt_glue.py"


def found(commands, folder, *more, script=GLUE):
    own = ["--method", "early-bird", "--draw-at", "4", "--output-dir", folder]
    return train(script, [*commands[script], *own, *more])


def test_a_run_searches_draws_and_trains_the_ticket_from_theta_0_and_gamma(commands, bert_dir, tmp_path):
    run = found(commands, tmp_path, "--batch-size", "16", "--keep-models")
    search, training = results(run)
    ticket, units = (Mask.load(run / f"level_0{level}" / "mask.safetensors") for level in (0, 1)), None
    first, second = ticket
    units = read_units(first)
    assert (first, first.info["units"], first.info["heads"]) == (second, "heads+neurons", 4)
    assert [int(row.sum()) for row in units["heads"]] == [3, 3]
    assert int(units["neurons"].sum()) == 128 - 51
    assert (search["steps"], training["steps"], training["removed"]) == (4, 6, {"heads": 2, "neurons": 51})
    record = np.load(run / "level_00" / "coefficients.npy", mmap_mode="r")
    assert (record.shape, record.dtype) == ((4, 2 * 4 + 2 * 64), np.float32)
    theta = load_bert(str(bert_dir), "classifier", "pretrained", 57)[0]
    first.apply(dict(theta.named_parameters()))
    assert search["init_sha256"] == training["init_sha256"] == sha256_of(encoder_weights(theta))
    kept = read_tensors_of_model(run)
    for name, gamma in head_weights(theta).items():
        assert np.array_equal(kept[name], gamma.detach()), name
    assert problems(run) == []
    assert not (run / "coefficients.part").exists()


def read_tensors_of_model(run):
    from safetensors.numpy import load_file

    return load_file(run / "level_00" / "model" / "model.safetensors")

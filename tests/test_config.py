"""Presets."""

from __future__ import annotations

import pytest

from bert_tickets.config import TASKS, build, flat, methods

# A value for every field of a run on GLUE, none of them the default.
GIVEN = {"task": "mrpc", "model": "some/folder", "data_dir": "glue_data", "output_dir": "elsewhere", "protocol": "released"}
GIVEN |= {"init": "random", "max_length": 64, "limit_train": 100, "limit_eval": 50, "device": "cuda:1", "keep_models": True}
GIVEN |= {
    "metric": "f1",
    "check_metrics": True,
    "dry_run": True,
    "epochs": 0.5,
    "batch_size": 16,
    "grad_accum": 2,
    "lr": 3e-5,
    "max_steps": 7,
}
GIVEN |= {"weight_decay": 0.01, "adam_epsilon": 1e-6, "max_grad_norm": 0.5, "graphs": "off", "tf32": True, "precision": "bf16"}
GIVEN |= {
    "eval_steps": 5,
    "report": "best",
    "limit_seed": "run",
    "seed": 1,
    "log_every": 10,
    "save_steps": 7,
    "save_minutes": 2.5,
}
NEEDED = {"report": {"eval_steps": 3}, "limit_seed": {"limit_train": 90}}  # without which a field is refused
OF_IMP = {"levels": 4, "rate": 0.05, "schedule": "geometric", "scope": "tensor", "prunable": "matrices+biases", "rewind": "5%"}
OF_IMP |= {"prune_first": True, "rewind_head": False, "decay": "once", "reset_optimizer": False}

# ---- presets ----

TABLE_1 = {  # Chen et al. 2020
    "glue": {"epochs": 3.0, "max_steps": None, "batch_size": 32, "lr": 2e-5, "max_length": 128},
    "squad": {"epochs": 2.0, "max_steps": None, "batch_size": 16, "lr": 3e-5, "max_length": 384, "doc_stride": 128},
    "mlm": {"max_steps": 10_000, "batch_size": 16, "lr": 5e-5, "max_length": 512, "prune_first": True},
}
ALIKE = {"levels": 10, "rate": 0.1, "schedule": "linear", "scope": "global", "prunable": "matrices", "rewind": "0"}
ALIKE |= {"rewind_head": True, "decay": "level", "reset_optimizer": True, "weight_decay": 0.0, "adam_epsilon": 1e-8}
ALIKE |= {"max_grad_norm": 1.0}
RELEASED = {  # where the released code differs
    "glue": {"rewind_head": False, "decay": "run"},
    "squad": {"rewind_head": False, "decay": "run", "epochs": 4.0},
    "mlm": {"rewind": "none"},
}


@pytest.mark.parametrize("kind", TASKS)
def test_presets_are_table_1_and_the_released_code(kind):
    of_kind = {"glue": ["guarded_magnitude", "importance"], "mlm": ["mask_training"]}
    assert methods(kind) == sorted(["early_bird", "imp", "score", "transfer", *of_kind.get(kind, [])])
    task = TASKS[kind][0]
    paper, released = (flat(build({"task": task, "protocol": protocol})) for protocol in ("paper", "released"))
    expected = ALIKE | TABLE_1[kind]
    assert {field: paper[field] for field in expected} == expected
    assert {field: value for field, value in released.items() if value != paper[field]} == {
        "protocol": "released",
        **RELEASED[kind],
    }
    transfer = flat(build({"task": task, "mask": "m", "method": "transfer"}))
    assert {field for field, value in transfer.items() if value != paper.get(field)} == {"method", "mask", "execution"}
    standard = build({"task": task, "protocol": "released", "rewind": "none"}).settings
    assert (standard.decay, standard.reset_optimizer, standard.prune_first) == ("once", False, kind == "mlm")
    assert build({"task": task, "rewind": "none"}).settings.decay == "level"  # of the paper's protocol


def test_a_flag_overrides_the_preset():
    cfg = build({"task": "rte", "protocol": "released", "rewind_head": True})
    assert (cfg.settings.rewind_head, cfg.settings.decay) == (True, "run")
    assert build({"task": "rte", "protocol": "released", "rewind": "none", "decay": "level"}).settings.decay == "level"
    mlm = build({"task": "mlm", "epochs": 1.0})
    assert (mlm.train.epochs, mlm.train.max_steps) == (1.0, None)

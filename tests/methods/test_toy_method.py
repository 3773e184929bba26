"""A method is one file and one preset: a toy method on PYTHONPATH gets flags, run directory, resume and transfer."""

import json

import pytest
from crash_harness import STEP, Fault
from trainrun import contents

from bert_tickets.files import read_facts

TOY = '''
"""Prune a fixed fraction of the weights at random, once per level."""

from __future__ import annotations

from dataclasses import dataclass

from bert_tickets.config import MethodSettings, flag


def run(session, s):
    from bert_tickets.masking.mask import Mask
    from bert_tickets.masking.prune import prune, random_scores
    from bert_tickets.modeling.parameters import prunable, rewind, snapshot
    from bert_tickets.seeds import seeded

    theta0, mask = snapshot(session.net), Mask.ones(prunable(session.net))
    for level in range(s.levels):
        if session.finished(level):
            mask = session.restore(level)
            continue
        scores = random_scores(prunable(session.net), seeded(session.cfg.train.seed, "toy", level))
        mask = prune(mask, scores, s.share)
        rewind(session.net, theta0, mask)
        session.train_level(level, mask)


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """The flags of `--method toy`."""

    share: float = flag("fraction of the remaining weights that a level prunes", 0.5)
    levels: int = flag("number of levels", 1)

    def plan(self):
        return [f"prune {self.share:.0%} in each of {self.levels} levels"]
'''
PRESET = 'kinds = ["glue"]\n\n[glue]\nshare = 0.2\nlr = 1e-3\n'


@pytest.fixture(scope="module")
def toy(harness):
    """The toy method, on PYTHONPATH of the harness."""
    assert len(TOY.strip().splitlines()) <= 40
    for place, text in (("methods/toy.py", TOY), ("presets/toy.toml", PRESET)):
        (harness.added / "bert_tickets" / place).write_text(text)


def test_a_toy_method_has_flags_and_a_plan(toy, harness, tmp_path):
    def shown(code, script, *words):
        outcome = harness.run(tmp_path, script, words)
        assert outcome.code == code, outcome.output
        return " ".join(outcome.output.split())

    said = shown(0, "lt_glue.py", "--method", "toy", "--help")
    assert "--share X fraction of the remaining weights that a level prunes (default: 0.2)" in said
    assert "--rewind" not in said
    assert "one of early_bird, guarded_magnitude, imp, importance, score, toy, transfer; here: toy" in said
    said = shown(0, "lt_glue.py", *["--method", "toy", "--task", "rte", "--levels", "3", "--dry-run"])
    assert "runs/rte-toy-s57-" in said
    assert "prune 20% in each of 3 levels" in said
    said = shown(2, "lt_squad.py", "--method", "toy")
    assert "there is no method toy for this script; the methods are early_bird, imp, score, transfer" in said
    said = shown(2, "lt_glue.py", "--task", "rte", "--share", "0.1")
    assert "--share belongs to --method toy, and this is --method imp" in said


def test_a_toy_method_resumes_and_its_mask_transfers(toy, harness, commands, tmp_path):
    words = [*commands["lt_glue.py"], *["--method", "toy", "--levels", "2", "--save-steps", "2"]]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert harness.run(killed, "lt_glue.py", words, Fault("SIGKILL", STEP, 9)).code == -9
    assert list(killed.glob("runs/rte-toy-*/checkpoint.safetensors"))
    for folder in (whole, killed):
        assert harness.run(folder, "lt_glue.py", words).code == 0
    assert contents(killed / "runs") == contents(whole / "runs")

    (run,) = (killed / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [(line["method"], line["level"], round(line["sparsity"], 2)) for line in lines] == [("toy", 0, 0.2), ("toy", 1, 0.36)]
    mask = run / "level_01" / "mask.safetensors"
    assert read_facts(mask)["method"] == "toy"
    outcome = harness.run(tmp_path / "moved", "lt_glue.py", [*commands["lt_glue.py"], "--mask", mask])
    assert outcome.code == 0, outcome.output
    (moved,) = (tmp_path / "moved" / "runs").iterdir()
    assert moved.name.startswith("rte-transfer-s57-")
    assert (moved / "level_00" / "mask.safetensors").read_bytes() == mask.read_bytes()

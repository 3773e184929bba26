"""Iterative magnitude pruning, run small: what each level starts from, and each quirk of the protocols."""

import pytest
import torch
from trainrun import train
from transformers import AutoModelForSequenceClassification

from bert_tickets.files import read_tensors, sha256_of
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.methods import imp
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import snapshot
from bert_tickets.runs import session
from bert_tickets.runs.directory import level_dir, results
from bert_tickets.training.step import Step

STEPS = 6  # of a level: 44 examples, 16 a step, two epochs


@pytest.fixture
def run_imp(bert_dir, glue_dir, tmp_path, monkeypatch):
    """A function that runs `lt_glue.py` in this process with small settings: the run directory and its results."""
    monkeypatch.chdir(tmp_path)

    def go(*more):
        words = f"--task sst2 --model {bert_dir} --data-dir {glue_dir} --batch-size 16 --lr 1e-3 --log-every 2 --levels 3"
        words += " --rate 0.3" + (" --epochs 2" if "--max-steps" not in more else "")
        run = train("lt_glue.py", [*words.split(), *more])
        return run, results(run)

    return go


@pytest.fixture
def watched(monkeypatch):
    """A list that grows by (step object, learning rate, head before) with every training step."""
    seen, plain = [], Step.__call__

    def call(self, batch, lr):
        seen.append((self, lr, self.params["classifier.weight"].detach().clone()))
        return plain(self, batch, lr)

    monkeypatch.setattr(Step, "__call__", call)
    return seen


@pytest.fixture(scope="session")
def theta0(bert_dir):
    """Every parameter before training, at the default seed."""
    return snapshot(load_bert(str(bert_dir), "classifier", "pretrained", 57)[0])


def mask_of(run, level):
    return Mask.load(level_dir(run, level) / "mask.safetensors")


def kept_model(run, level):
    """The tensors of a level's kept model, as transformers opens it."""
    return AutoModelForSequenceClassification.from_pretrained(level_dir(run, level) / "model").state_dict()


def sha256_of_masked(theta, mask):
    """The sha256 of the encoder m * theta."""
    return sha256_of({name: w * mask[name] if name in mask else w for name, w in theta.items() if name.startswith("bert.")})


# ---- Algorithm 1 ----


@pytest.mark.parametrize("prunable", ["matrices", "matrices+biases", "matrices+embeddings"])
def test_each_level_prunes_what_the_one_before_trained_and_starts_from_mask_times_theta0(run_imp, theta0, prunable):
    run, found = run_imp("--keep-models", "--prunable", prunable)
    masks = [mask_of(run, level) for level in range(3)]
    assert ("bert.encoder.layer.0.intermediate.dense.bias" in masks[2]) == (prunable == "matrices+biases")
    for level, (result, mask) in enumerate(zip(found, masks, strict=True)):
        assert result["init_sha256"] == sha256_of_masked(theta0, mask)
        assert result["sparsity"] == pytest.approx(0.3 * level, abs=1 / mask.total)
        assert result["mask_sha256"] == mask.sha256()
        assert (mask.info["method"], mask.info["task"], mask.info["level"]) == ("imp", "sst2", level)
        trained = kept_model(run, level)
        assert all((trained[name][~kept] == 0).all() for name, kept in mask.items())
        if level < 2:
            fraction = 0.3 / (1 - 0.3 * level)
            assert prune(mask, magnitude({name: trained[name] for name in mask}), fraction) == masks[level + 1]


def test_geometric_schedule_and_tensor_scope(run_imp):
    run, found = run_imp("--schedule", "geometric", "--scope", "tensor", "--max-steps", "1")
    assert [result["sparsity"] for result in found] == pytest.approx([0, 0.3, 0.51], abs=1e-3)
    assert all(abs(kept.float().mean().item() - 0.49) < 1e-2 for kept in mask_of(run, 2).values())


# ---- rewinding ----


@pytest.mark.parametrize("rewind", ["2", "34%"])
def test_rewinding_to_a_later_step_starts_there(run_imp, watched, rewind):
    run, found = run_imp("--rewind", rewind)
    assert [result["steps"] for result in found] == [STEPS, STEPS - 2, STEPS - 2]
    theta = read_tensors(run / "rewind.safetensors")
    for result in found[1:]:
        assert result["init_sha256"] == sha256_of_masked(theta, mask_of(run, result["level"]))
    assert watched[STEPS][1] == pytest.approx(1e-3 * (1 - 2 / STEPS))  # the schedule goes on from the rewinding step
    assert torch.equal(watched[STEPS][2], theta["classifier.weight"])
    assert not torch.equal(watched[0][2], theta["classifier.weight"])


@pytest.mark.parametrize("resets", [False, True])
def test_standard_pruning_trains_on_without_rewinding(run_imp, watched, resets):
    run, found = run_imp("--rewind", "none", "--levels", "2", "--keep-models", *["--reset-optimizer"] * resets)
    trained = kept_model(run, 0)
    assert found[1]["init_sha256"] == sha256_of_masked(trained, mask_of(run, 1))
    optimizer = watched[STEPS][0].optimizer
    assert optimizer.state[watched[STEPS][0].params["classifier.weight"]]["step"] == STEPS * (1 if resets else 2)
    assert [result["skipped_steps"] for result in found] == [0, 0]


@pytest.mark.parametrize("more", [[], ["--rewind", "none"], ["--rewind", "none", "--reset-optimizer"]], ids=" ".join)
def test_prune_first_starts_level_1_from_theta0(run_imp, theta0, more, monkeypatch):
    plain, moments = session.train, []
    monkeypatch.setattr(session, "train", lambda *args, **kept: moments.append(bool(kept["moments"])) or plain(*args, **kept))
    run, found = run_imp("--prune-first", *more)
    masks = [mask_of(run, level) for level in range(3)]
    assert prune(masks[0], magnitude({name: theta0[name] for name in masks[0]}), 0.3) == masks[1]
    starts = [sha256_of_masked(theta0, mask) for mask in masks]
    assert [result["init_sha256"] == start for result, start in zip(found, starts, strict=True)] == [True, True, not more]
    assert moments == [False, False, more == ["--rewind", "none"]]


# ---- the learning rate and the head, by protocol ----


@pytest.mark.parametrize(
    ("more", "span", "restarts", "head_rewound"),
    [
        ([], 1, True, True),
        (["--protocol", "released"], 4, True, False),  # four levels at --rate 0.3
        (["--protocol", "released", "--rewind", "none"], 3, False, False),
        (["--decay", "once"], 3, False, True),
        (["--protocol", "released", "--rewind-head"], 4, True, True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_decay_and_head_of_each_level(run_imp, watched, theta0, more, span, restarts, head_rewound):
    run_imp(*more)
    assert len(watched) == 3 * STEPS
    for level in range(3):
        first = 0 if restarts else level * STEPS
        expected = [1e-3 * (1 - (first + i) / (span * STEPS)) for i in range(STEPS)]
        assert [lr for _, lr, _ in watched[level * STEPS : (level + 1) * STEPS]] == pytest.approx(expected)
        assert torch.equal(watched[level * STEPS][2], theta0["classifier.weight"]) == (head_rewound or level == 0)
    taken = {int(state["step"]) for state in watched[-1][0].optimizer.state.values()}
    assert taken == {3 * STEPS if "none" in more else STEPS}  # one AdamW throughout, or a new one for each level


def test_levels_differ_by_their_masks_alone(run_imp, monkeypatch):
    monkeypatch.setattr("bert_tickets.masking.prune.prune", lambda mask, *_: mask)
    _, (dense, same) = run_imp("--levels", "2")
    assert dense["losses"] == same["losses"]
    assert dense["metrics"] == same["metrics"]


# ---- settings ----


@pytest.mark.parametrize(
    ("rewind", "step"), [("0", 0), ("none", 0), ("20", 20), ("5%", 10), ("99%", 198), ("200", None), ("99.9%", None)]
)
def test_rewind_is_a_step_or_a_percentage_of_a_level_before_its_end(rewind, step):
    settings = imp.Settings(rewind=rewind)
    if step is not None:
        assert settings.rewind_step(200) == step
    else:
        with pytest.raises(imp.UserError, match="nothing would be trained"):
            settings.rewind_step(200)


@pytest.mark.parametrize(
    ("given", "level", "span", "index"),
    [
        ({"decay": "run"}, 2, 10, 0),
        ({"decay": "run", "levels": 4}, 2, 10, 0),  # a shorter run is the beginning of the whole one
        ({"decay": "run", "schedule": "geometric", "levels": 5}, 2, 10, 0),
        ({"decay": "once", "levels": 3}, 2, 3, 2),
        ({"decay": "once", "levels": 3, "prune_first": True}, 2, 2, 1),
        ({"decay": "once", "levels": 3, "prune_first": True}, 0, 1, 0),  # level 0 is for comparison, and decays by itself
    ],
)
def test_decay_spans_levels(given, level, span, index):
    rate = imp.Settings(**given).learning_rate(1.0, level, 100)
    assert [rate(step) for step in (0, 50, 100)] == pytest.approx([1 - (index + part) / span for part in (0, 0.5, 1)])


def test_rate_alone_takes_as_many_levels_as_it_allows():
    assert [imp.Settings(rate=rate).levels for rate in (0.2, 0.3, 0.05)] == [5, 4, 10]
    assert imp.Settings(rate=0.2, schedule="geometric").levels == 10

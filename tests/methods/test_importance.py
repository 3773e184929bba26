"""The guarded search of heads and MLPs: its phases, its invariants, and a pass of it (Prasanna et al. 2020)."""

from types import SimpleNamespace

import pytest
import torch
from formula_net import formula_net, formula_store

from bert_tickets.data.batches import Subset
from bert_tickets.methods.finetuned import Guard, guard_score, search_set
from bert_tickets.methods.importance import Settings, importances, measure, search
from bert_tickets.modeling.units import all_units
from bert_tickets.tasks.create import create
from bert_tickets.training.distributed import SINGLE_PROCESS

BASE = SimpleNamespace(num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)


def searched(score, threshold=0.9, scores=None, config=BASE, **settings):
    """Search with scores that are a function of the numbers of heads and MLPs. Returns the good units and the passes."""
    s, seen = Settings(threshold=threshold, **settings), []
    full = all_units(config, s.units)
    order = scores or {kind: torch.arange(kept.numel()).view(kept.shape).double() for kind, kept in full.items()}

    def measured(units):
        seen.append(units)
        counts = [int(units[kind].sum()) if kind in units else 0 for kind in ("heads", "mlps")]
        return score(*counts), (order(len(seen)) if callable(order) else order)

    guard = Guard(threshold)
    good = search(full, measured, guard, s)
    assert len(seen) == len(guard.passes)
    return good, guard.passes


def counts(passes):
    return [(p["phase"], p.get("heads"), p.get("mlps"), p["accepted"]) for p in passes]


# ---- the search ----


def test_three_phases_and_their_sizes_on_bert_base():
    good, passes = searched(lambda heads, mlps: 1.0 if heads >= 109 and mlps >= 8 else 0.5)
    assert counts(passes) == [
        ("heads+mlps", 144, 12, True),
        ("heads+mlps", 130, 11, True),
        ("heads+mlps", 116, 10, True),
        ("heads+mlps", 102, 9, False),
        ("heads", 109, 10, True),
        ("heads", 102, 10, False),
        ("mlps", 109, 9, True),
        ("mlps", 109, 8, True),
        ("mlps", 109, 7, False),
    ]
    assert good["heads"].flatten().tolist() == [False] * 35 + [True] * 109  # the least important first
    assert good["mlps"].tolist() == [False] * 4 + [True] * 8
    assert passes[1]["dropped"] == {"heads": [*range(14)], "mlps": [0]}
    assert passes[4]["dropped"] == {"heads": [*range(28, 35)], "mlps": []}


def test_the_first_drop_of_a_phase_goes_by_the_importances_of_the_rejected_pass():
    """Each pass has another order: pass n says that unit 20 n is the least important, and those after it."""

    def order(number):
        heads = torch.arange(144).roll(20 * (number - 1)).view(12, 12).double()
        return {"heads": heads, "mlps": torch.arange(12).double()}

    _, passes = searched(lambda heads, mlps: 1.0 if heads >= 130 else 0.5, scores=order)
    assert [p["accepted"] for p in passes[:4]] == [True, True, False, False]
    assert passes[2]["dropped"]["heads"] == [*range(20, 34)]
    assert passes[3]["dropped"]["heads"] == [*range(40, 47)]  # of pass 3, which was rejected


def test_heads_kept_are_144_less_14_and_7_at_a_time_and_masks_shrink():
    for limit in range(0, 145, 9):
        _, passes = searched(lambda heads, mlps, limit=limit: 1.0 if heads >= limit else 0.0)
        accepted = [p["heads"] for p in passes if p["accepted"]]
        assert accepted == sorted(accepted, reverse=True)
        assert (144 - accepted[-1]) % 7 == 0 or accepted[-1] == 0
        assert limit <= accepted[-1] < limit + 7 or accepted[-1] == 0
        assert all(p["score"] >= 0.9 for p in passes if p["accepted"])


def test_threshold_zero_leaves_nothing_and_one_above_one_everything():
    good, _ = searched(lambda heads, mlps: (heads + mlps) / 156, threshold=0)
    assert good.kept == 0
    good, passes = searched(lambda heads, mlps: (heads + mlps) / 156, threshold=1.01)
    assert good.kept == 156
    assert counts(passes)[1:] == [("heads", 137, 12, False), ("mlps", 144, 11, False)]  # no pass of the first phase


def test_one_kind_alone_has_one_phase():
    good, passes = searched(lambda heads, mlps: 1.0 if heads > 100 else 0.0, units="heads")
    assert [*good] == ["heads"]
    assert counts(passes) == [("heads", n, None, n > 100) for n in (144, 130, 116, 102, 88)]
    _, passes = searched(lambda heads, mlps: 1.0 if mlps > 10 else 0.0, units="mlps")
    assert counts(passes) == [("mlps", None, n, n > 10) for n in (12, 11, 10)]


def test_where_no_head_is_left_the_mlps_go_on_from_the_accepted_mask():
    good, passes = searched(lambda heads, mlps: 1.0 if mlps >= 2 else 0.0)
    assert counts(passes)[11:] == [  # ten times 14 heads are 140: the last four go together, and then the phase ends
        ("heads+mlps", 0, 1, False),
        ("heads", 0, 2, True),
        ("mlps", 0, 1, False),
    ]
    assert (int(good["heads"].sum()), int(good["mlps"].sum())) == (0, 2)


def test_a_tiny_model_drops_one_head_at_a_time_and_has_no_phase_of_heads():
    tiny = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, intermediate_size=8)
    _, passes = searched(lambda heads, mlps: 1.0 if mlps == 2 else 0.0, config=tiny)
    assert counts(passes) == [("heads+mlps", 8, 2, True), ("heads+mlps", 7, 1, False), ("mlps", 8, 1, False)]


def test_an_undefined_score_is_rejected():
    good, passes = searched(lambda heads, mlps: 1.0 if heads == 144 and mlps > 10 else None)
    assert counts(passes) == [
        ("heads+mlps", 144, 12, True),
        ("heads+mlps", 130, 11, False),
        ("heads", 137, 12, False),
        ("mlps", 144, 11, True),
        ("mlps", 144, 10, False),
    ]
    assert int(good["mlps"].sum()) == 11
    good, passes = searched(lambda heads, mlps: None)
    assert good.kept == 156
    assert not any(p["accepted"] for p in passes)


def test_the_score_that_guards():
    assert guard_score({"matthews": 0.5, "accuracy": 0.8}) == 0.5
    assert guard_score({"pearson": 0.5, "spearman": 0.7}) == pytest.approx(0.6)
    assert guard_score({"pearson": float("nan"), "spearman": 0.7}) is None
    assert guard_score({"accuracy": 0.8, "f1": 0.7}) == 0.8


# ---- a pass ----


def session_of(evals=None, train=None):
    """A session of a formula's network on eight examples."""
    net, device = formula_net().requires_grad_(False), torch.device("cpu")
    evals = {"validation": formula_store()} if evals is None else evals
    cfg = SimpleNamespace(train=SimpleNamespace(seed=1))
    batches, run = SimpleNamespace(store=train, device=device), SimpleNamespace(group=SINGLE_PROCESS)
    return SimpleNamespace(net=net, task=create("sst2"), evals=evals, batches=batches, run=run, cfg=cfg)


def test_a_pass_has_the_importances_of_the_released_code():
    session, full = session_of(), all_units(formula_net().config, "heads+mlps")
    found = measure(session, full, Settings())
    assert found["heads"][0] == pytest.approx([1.719231, 0.519059, 2.362478, 1.322039], abs=1e-5)
    assert found["mlps"] == pytest.approx([1.399564, 2.271302, 0.794947], abs=1e-5)
    assert importances(found, Settings())["heads"].flatten().argsort()[:6].tolist() == [1, 11, 9, 8, 5, 7]
    raw = torch.tensor(found["heads"])
    plain = importances(found, Settings(normalize="none"))["heads"]
    torch.testing.assert_close(plain, ((raw - raw.min()) / (raw.max() - raw.min())).double(), rtol=0, atol=1e-6)
    s = Settings(accumulate="reference", search_batch_size=4)
    found = measure(session, full, s)
    assert found["mlps"] == pytest.approx([0.156208, 0.125564, 0.036130], abs=1e-5)
    assert importances(found, s)["heads"].flatten().argsort()[:6].tolist() == [5, 1, 0, 4, 8, 9]


def test_the_search_set_is_the_first_dev_set_or_as_many_training_examples():
    stores = {"validation_matched": formula_store(), "validation_mismatched": formula_store()}
    assert search_set(session_of(stores), Settings()) == ("validation_matched", stores["validation_matched"])
    few = {"validation": Subset(formula_store(), torch.arange(3))}
    name, drawn = search_set(session_of(few, formula_store()), Settings(search_set="train"))
    assert (name, len(drawn)) == ("train", 3)
    assert drawn.examples.tolist() == sorted(drawn.examples.tolist())
    batch = drawn.batch(torch.tensor([2]))
    assert batch.lengths.tolist() == [drawn.lengths[2]]
    assert torch.equal(batch.input_ids, formula_store().batch(drawn.examples[2:]).input_ids)

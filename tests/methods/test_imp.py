"""The experiments, run small: what each level starts from, and each quirk of the protocols."""

import json

import pytest
import torch

import lt_glue
from bert_tickets.cli import parse
from bert_tickets.errors import UserError
from bert_tickets.files import sha256_of
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.methods.imp import oneshot
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import encoder_weights, prunable, snapshot
from bert_tickets.runs.session import Run
from bert_tickets.training.step import Step


@pytest.fixture
def run_glue(bert_dir, glue_dir, tmp_path, monkeypatch):
    """`lt_glue.py` in this process with small settings: (run, results)."""
    monkeypatch.chdir(tmp_path)

    def go(*extra, model=bert_dir):
        argv = f"--task sst2 --model {model} --data-dir {glue_dir} --batch-size 16 --lr 1e-3"
        argv += "" if "--mask" in extra else " --levels 3 --rate 0.3"
        argv += "" if "--max-steps" in extra else " --epochs 2"
        cfg = parse("glue", None, f"{argv} --log-every 2".split() + [str(word) for word in extra])
        lt_glue.main(cfg)
        run = Run(cfg, "glue")
        return run, run.results()

    return go


@pytest.fixture
def watched(monkeypatch):
    """What every step is called with and starts from: a list of (step object, learning rate, head before)."""
    seen = []
    plain = Step.__call__

    def call(self, batch, lr):
        seen.append((self, lr, self.params["classifier.weight"].detach().clone()))
        return plain(self, batch, lr)

    monkeypatch.setattr(Step, "__call__", call)
    return seen


def theta0(bert_dir, seed=57):
    return snapshot(load_bert(str(bert_dir), "classifier", "pretrained", seed)[0])


def test_each_level_starts_at_its_mask_times_theta0(run_glue, bert_dir):
    run, results = run_glue()
    weights = {name: w for name, w in theta0(bert_dir).items() if name.startswith("bert.")}
    for result in results:
        mask = Mask.load(run.level_dir(result["level"]) / "mask.safetensors")
        start = {name: w * mask[name] if name in mask else w for name, w in weights.items()}
        assert result["init_sha256"] == sha256_of(start)
        assert result["sparsity"] == pytest.approx(0.3 * result["level"], abs=1 / result["total"])
        assert result["mask_sha256"] == mask.sha256()


def test_each_mask_is_the_magnitude_of_what_the_level_before_trained(run_glue):
    from safetensors.torch import load_file

    run, _ = run_glue("--levels", "2", "--keep-models")
    trained = load_file(run.level_dir(0) / "model" / "model.safetensors")
    mask0, mask1 = (Mask.load(run.level_dir(level) / "mask.safetensors") for level in (0, 1))
    assert prune(mask0, magnitude({name: trained[name] for name in mask0}), 0.3) == mask1
    final = load_file(run.level_dir(1) / "weights.safetensors")
    assert all((final[name][~kept] == 0).all() for name, kept in mask1.items())


@pytest.mark.parametrize("extra", [[], ["--rewind", "none"], ["--rewind", "none", "--reset-optimizer"]])
def test_pruning_first_starts_level_1_from_theta0_as_if_there_were_no_level_0(run_glue, bert_dir, extra, monkeypatch):
    from bert_tickets.methods import imp as lottery

    plain, given = lottery.train, []
    monkeypatch.setattr(lottery, "train", lambda *args, **kept: given.append(bool(kept["moments"])) or plain(*args, **kept))
    run, results = run_glue("--prune-first", *extra)
    masks = [Mask.load(run.level_dir(level) / "mask.safetensors") for level in range(3)]
    weights = {name: w for name, w in theta0(bert_dir).items() if name.startswith("bert.")}
    assert prune(masks[0], magnitude({name: weights[name] for name in masks[0]}), 0.3) == masks[1]
    starts = [sha256_of({name: w * mask[name] if name in mask else w for name, w in weights.items()}) for mask in masks]
    found = [result["init_sha256"] for result in results]
    assert found[:2] == starts[:2]
    assert (found[2] == starts[2]) == (not extra)
    assert given == [False, False, extra == ["--rewind", "none"]]


def test_a_level_learns(run_glue):
    _, results = run_glue("--levels", "1", "--epochs", "20", "--lr", "5e-3")
    assert results[0]["losses"][-1][1] < 0.8 * results[0]["losses"][0][1]
    assert results[0]["metrics"]["accuracy"] > 0.6


def test_paper_protocol_decays_to_zero_in_each_level_and_rewinds_the_head(run_glue, watched, bert_dir):
    _, results = run_glue()
    steps = results[0]["steps"]
    assert len(watched) == 3 * steps
    for level in range(3):
        rates = [lr for _, lr, _ in watched[level * steps : (level + 1) * steps]]
        assert rates == pytest.approx([1e-3 * (1 - i / steps) for i in range(steps)])
        assert torch.equal(watched[level * steps][2], theta0(bert_dir)["classifier.weight"])


def test_released_protocol_spans_all_levels_and_carries_the_head_on(run_glue, watched, bert_dir):
    _, results = run_glue("--protocol", "released")
    steps = results[0]["steps"]
    heads = [watched[level * steps][2] for level in range(3)]
    for level in range(3):
        rates = [lr for _, lr, _ in watched[level * steps : (level + 1) * steps]]
        assert rates == pytest.approx([1e-3 * (1 - i / (4 * steps)) for i in range(steps)])  # four levels at --rate 0.3
    assert torch.equal(heads[0], theta0(bert_dir)["classifier.weight"])
    assert not torch.equal(heads[1], heads[0])
    assert not torch.equal(heads[2], heads[1])


def test_released_standard_pruning_lets_the_rate_fall_once_and_keeps_its_adamw(run_glue, watched):
    """As the released run_glue_prun.py: the rate never begins anew, and reaches zero at the end of the run."""
    _, results = run_glue("--protocol", "released", "--rewind", "none")
    steps = results[0]["steps"]
    assert [lr for _, lr, _ in watched] == pytest.approx([1e-3 * (1 - i / (3 * steps)) for i in range(3 * steps)])
    last = watched[-1][0]
    assert {int(state["step"]) for state in last.optimizer.state.values()} == {3 * steps}
    for level in (1, 2):  # the head goes on from where the level before left it
        assert not torch.equal(watched[level * steps][2], watched[0][2])


def test_a_fall_over_the_run_goes_on_where_it_was_after_a_kill(run_glue, watched, monkeypatch):
    extra = ["--protocol", "released", "--rewind", "none", "--save-steps", "2"]
    expected = run_glue(*extra, "--output-dir", "whole")[1]
    calls, plain = 0, Step.__call__

    def dying(self, batch, lr):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return plain(self, batch, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", dying)
        with pytest.raises(KeyboardInterrupt):
            run_glue(*extra, "--output-dir", "killed")
    assert run_glue(*extra, "--output-dir", "killed")[1] == expected


def test_each_quirk_has_its_own_flag(run_glue):
    names = {
        run_glue("--levels", "1", *flags)[0].dir.name
        for flags in ([], ["--decay", "run"], ["--no-rewind-head"], ["--protocol", "released"])
    }
    assert len(names) == 4


@pytest.mark.parametrize("rewind", ["2", "34%"])
def test_rewinding_to_a_later_step_starts_there(run_glue, watched, rewind):
    run, results = run_glue("--rewind", rewind)
    steps = 6  # 44 examples, 16 a step, two epochs
    assert [result["steps"] for result in results] == [steps, steps - 2, steps - 2]
    theta = run.load_rewind()
    for result in results[1:]:
        mask = Mask.load(run.level_dir(result["level"]) / "mask.safetensors")
        start = {name: w * mask[name] if name in mask else w for name, w in theta.items() if name.startswith("bert.")}
        assert result["init_sha256"] == sha256_of(start)
    assert watched[steps][1] == pytest.approx(1e-3 * (1 - 2 / steps))  # the schedule goes on from the rewinding step
    assert torch.equal(watched[steps][2], theta["classifier.weight"])
    assert not torch.equal(watched[0][2], theta["classifier.weight"])


def test_standard_pruning_trains_on_without_rewinding(run_glue, watched):
    run, results = run_glue("--rewind", "none", "--levels", "2", "--keep-models")
    from safetensors.torch import load_file

    trained = load_file(run.level_dir(0) / "model" / "model.safetensors")
    mask = Mask.load(run.level_dir(1) / "mask.safetensors")
    start = {name: w * mask[name] if name in mask else w for name, w in trained.items() if name.startswith("bert.")}
    assert results[1]["init_sha256"] == sha256_of(start)
    assert watched[6][0].optimizer.state[watched[6][0].params["classifier.weight"]]["step"] == 12  # AdamW went on
    assert [line["skipped_steps"] for line in results] == [0, 0]


def test_standard_pruning_with_a_new_optimiser(run_glue, watched):
    run_glue("--rewind", "none", "--levels", "2", "--reset-optimizer")
    assert watched[6][0].optimizer.state[watched[6][0].params["classifier.weight"]]["step"] == 6


def test_geometric_levels_are_algorithm_1_to_the_letter(run_glue):
    _, results = run_glue("--schedule", "geometric")
    for result in results:
        assert result["sparsity"] == pytest.approx(1 - 0.7 ** result["level"], abs=2 / result["total"])


def test_a_tensor_scope_prunes_every_matrix_alike(run_glue):
    run, _ = run_glue("--scope", "tensor", "--levels", "2")
    mask = Mask.load(run.level_dir(1) / "mask.safetensors")
    assert all(abs(kept.float().mean().item() - 0.7) < 1e-2 for kept in mask.values())


def test_a_given_ticket_is_trained_once(run_glue, tmp_path, bert_dir):
    net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0]
    mask = oneshot(net, 0.5, "random", 3)
    mask.write("m.safetensors", method="oneshot random")
    run, results = run_glue("--mask", "m.safetensors")
    assert len(results) == 1
    assert results[0]["sparsity"] == 0.5
    kept = Mask.load(run.level_dir(0) / "mask.safetensors")
    assert kept == mask
    assert kept.info == {"method": "oneshot random"}
    weights = {n: w * mask[n] if n in mask else w for n, w in theta0(bert_dir).items() if n.startswith("bert.")}
    assert results[0]["init_sha256"] == sha256_of(weights)


def test_a_mask_of_another_checkpoint_is_pointed_out(run_glue, tmp_path, bert_dir, capsys):
    net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0]
    mask = oneshot(net, 0.5, "magnitude", 0)
    for base, said in [("bert-base-cased", True), (str(bert_dir), False)]:
        mask.write(tmp_path / "m.safetensors", base_model=base)
        run_glue("--mask", tmp_path / "m.safetensors", "--max-steps", 1)
        assert ("the mask was found on bert-base-cased" in capsys.readouterr().out) == said


def test_a_released_mask_pt_trains_as_the_mask_it_holds(run_glue, bert_dir):
    mask = oneshot(load_bert(str(bert_dir), "classifier", "pretrained", 0)[0], 0.5, "magnitude", 0)
    mask.write("m.safetensors")
    torch.save({f"{name}_mask": kept.float() for name, kept in mask.items()}, "mask.pt")
    (_, ours), (_, released) = run_glue("--mask", "m.safetensors"), run_glue("--mask", "mask.pt")
    names = [line.pop("run") for line in (*ours, *released)]
    assert names[0] != names[1]  # a mask counts by its file's content
    assert ours == released


@pytest.mark.parametrize("init", ["random", "file"])
def test_the_ticket_starts_from_the_weights_asked_for(run_glue, bert_dir, init):
    if init == "file":
        from safetensors.torch import save_file

        net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0]
        save_file({name: p.detach() + 1 for name, p in encoder_weights(net).items()}, "w.safetensors")
        expected, init = {name: p.detach() + 1 for name, p in encoder_weights(net).items()}, "w.safetensors"
    else:
        expected = encoder_weights(load_bert(str(bert_dir), "classifier", "random", 57)[0])
    _, results = run_glue("--levels", "1", "--init", init)
    assert results[0]["init_sha256"] == sha256_of(expected)


def test_a_mask_of_another_architecture_names_the_tensor(run_glue, bert_dir):
    net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0]
    tensors = {name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(net).items()}
    name = "bert.encoder.layer.1.output.dense.weight"
    Mask(tensors | {name: torch.ones(2, 2, dtype=torch.bool)}).write("m.safetensors")
    with pytest.raises(UserError, match=rf"{name} is 32 x 64 in the model and 2 x 2 in the mask"):
        run_glue("--mask", "m.safetensors")


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_a_oneshot_mask_of_tensor_scope_takes_the_share_of_every_matrix(bert_dir, method):
    net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0]
    mask = oneshot(net, 0.4, method, 1, "tensor")
    assert all(int((~kept).sum()) == round(0.4 * kept.numel()) for kept in mask.values())
    if method == "magnitude":
        weights = prunable(net)
        for name, kept in mask.items():
            assert weights[name][kept].abs().min() >= weights[name][~kept].abs().max()


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_oneshot_masks(bert_dir, method):
    net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0]
    mask = oneshot(net, 0.4, method, 1)
    assert mask.kept == mask.total - round(0.4 * mask.total)
    if method == "magnitude":
        import torch.nn.utils.prune as torch_prune

        modules = [(net.get_submodule(name.removesuffix(".weight")), "weight") for name in prunable(net)]
        torch_prune.global_unstructured(modules, torch_prune.L1Unstructured, amount=0.4)
        assert all(torch.equal(kept, net.get_submodule(n.removesuffix(".weight")).weight_mask.bool()) for n, kept in mask.items())
    else:
        assert mask != oneshot(net, 0.4, method, 2)
        assert mask == oneshot(net, 0.4, method, 1)


def test_equal_settings_give_equal_results_and_another_seed_other_ones(run_glue, tmp_path):
    _, first = run_glue("--output-dir", "a")
    _, second = run_glue("--output-dir", "b")
    _, other = run_glue("--output-dir", "a", "--seed", "58")
    assert first == second
    assert first[0]["losses"] != other[0]["losses"]


def test_a_nan_loss_ends_the_run_in_words_and_saves_nothing_of_it(run_glue, watched, monkeypatch):
    plain = Step.__call__

    def poisoned(self, batch, lr):
        loss = plain(self, batch, lr)
        return loss * float("nan") if len(watched) > 8 else loss

    monkeypatch.setattr(Step, "__call__", poisoned)
    with pytest.raises(UserError, match="loss became nan"):
        run_glue("--save-steps", "1")
    monkeypatch.undo()


def test_an_all_ones_level_from_theta_i_replays_the_dense_level(run_glue, monkeypatch):
    """Levels differ by their masks alone: with nothing pruned, and AdamW new at the step both start from, so do not they."""
    monkeypatch.setattr("bert_tickets.methods.imp.prune", lambda mask, *_: mask)
    _, results = run_glue("--levels", "2")
    assert results[0]["losses"] == results[1]["losses"]
    assert results[0]["metrics"] == results[1]["metrics"]


def test_dropout_of_a_step_does_not_depend_on_where_training_began(run_glue, monkeypatch):
    draws: dict[int, list[float]] = {}
    plain = Step.__call__

    def call(self, batch, lr):
        draws.setdefault(round(6 * (1 - lr / 1e-3)), []).append(torch.rand(1).item())
        return plain(self, batch, lr)

    monkeypatch.setattr(Step, "__call__", call)
    run_glue("--rewind", "2", "--levels", "2")
    assert [len(draws[step]) for step in range(6)] == [1, 1, 2, 2, 2, 2]
    assert all(len(set(values)) == 1 for values in draws.values())
    assert len({values[0] for values in draws.values()}) == 6


def test_a_mask_may_name_biases_and_must_cover_every_matrix(run_glue, bert_dir):
    net = load_bert(str(bert_dir), "classifier", "pretrained", 0)[0]
    ones = dict(Mask.ones(prunable(net)))
    bias = "bert.encoder.layer.0.intermediate.dense.bias"
    Mask(ones | {bias: torch.arange(64) % 2 == 0}).write("bias.safetensors")
    run, _ = run_glue("--mask", "bias.safetensors", "--keep-models")
    from safetensors.torch import load_file

    trained = load_file(run.level_dir(0) / "weights.safetensors")[bias]
    assert (trained[1::2] == 0).all()
    assert (trained[::2] != 0).all()
    ones.pop("bert.pooler.dense.weight")
    Mask(ones).write("part.safetensors")
    with pytest.raises(UserError, match=r"the model has bert\.pooler\.dense\.weight, which the mask does not cover"):
        run_glue("--mask", "part.safetensors")


def test_max_steps_and_limits(run_glue):
    run, results = run_glue("--max-steps", "3", "--limit-train", "20", "--limit-eval", "7", "--levels", "1")
    assert results[0]["steps"] == 3
    facts = json.loads((run.dir / "run.json").read_text())["fingerprint"]
    assert facts["train"]["examples"] == 20
    assert facts["evaluation"]["validation"]["examples"] == 7


def test_a_mnli_run_reports_both_sets(run_glue):
    _, results = run_glue("--task", "mnli", "--levels", "1")
    assert set(results[0]["metrics"]) == {"accuracy", "accuracy_mm"}
    assert results[0]["metric"] == "accuracy"


def test_golden_losses_of_ten_steps_a_task(calm_bert_dir, glue_dir, squad_dir, corpus_dir):
    """Computed once with padded batches of Hugging Face's own model (`python tests/golden.py` makes them again)."""
    from golden import GOLDEN, cases, losses

    golden = json.loads(GOLDEN.read_text())
    found = cases(calm_bert_dir, glue_dir, squad_dir, corpus_dir)
    assert set(golden) == set(found)
    for task, expected in golden.items():
        assert losses(*found[task], packed=True) == pytest.approx(expected, abs=2e-5), task

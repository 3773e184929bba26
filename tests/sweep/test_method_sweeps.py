"""What the sweeps of mask training, of heads and MLPs, and of EarlyBERT run."""

from pathlib import Path

from sweeps import flag, lines, stub, sweep

from bert_tickets.sweep.jobs import TRAINING


def masks_of(whole: list[list[str]], name: str) -> set[str]:
    """The masks that the commands train, of runs of a method or in a folder."""
    return {mask for words in whole if (mask := flag(words, "--mask")) and name in mask}


def test_mask_training_runs_to_the_steps_of_imp_and_its_tickets_train_with_seeds_of_their_own(tmp_path):
    whole = lines("tamt", tmp_path, SEEDS="1 2", TASKS="rte squad", SPARSITIES="50 70 80", STEPS="1000 20000")
    trained = [words for words in whole if "mask-training" in words]
    assert {(flag(words, "--sparsity"), flag(words, "--ticket-step")) for words in trained} == {
        ("0.5", "11000"), ("0.7", "17000"), ("0.8", "20000"),
    }  # fmt: skip
    assert len(trained) == 2 * 3 * 3
    searched = [words for words in whole if words[0] == "lt_pretrain.py" and "--mask" not in words and "--method" not in words]
    assert [(flag(words, "--seed"), flag(words, "--max-steps"), flag(words, "--scope")) for words in searched] == [
        ("1", "2792", "tensor"), ("2", "2792", "tensor"),
    ]  # fmt: skip
    assert {mask.split("/")[-1] for mask in masks_of(whole, "/masks/step")} == {"step_0001000.safetensors"}  # 20000 is too late
    given = [words for words in whole if "--mask" in words and words[0] != "lt_pretrain.py"]
    ours = next(mask for mask in masks_of(whole, "step_"))
    assert {(words[0], flag(words, "--seed")) for words in given if flag(words, "--mask") == ours} in (
        {(script, str(seed + more)) for script in ("lt_glue.py", "lt_squad.py") for more in (0, 10, 20)} for seed in (1, 2)
    )
    scored = [words for words in whole if "--score" in words]
    assert len(scored) == 3 + 2 * 3 * (1 + 1 + 2 * 3)  # one-shot once; random, IMP, and of three objectives the ticket and a step
    assert all("matrices+embeddings" in words and "tensor" in words for words in whole if words[0] == "oneshot.py")


def test_a_figure_that_fails_does_not_end_the_sweep_before_the_others(tmp_path):
    python = stub(tmp_path, f'[[ "$*" != *figures.py* ]] || {{ echo "$2" >> {tmp_path}/drawn; exit 2; }}')
    found = sweep("tamt", TASKS="rte", SEEDS="1", RUNS="1", SPARSITIES="70", OBJECTIVES="kd", PYTHON=python, OUTPUT=str(tmp_path))
    assert (tmp_path / "drawn").read_text().split() == ["distance", "losses", "curves"]
    assert found.returncode == 1
    assert "3 command(s) failed" in found.stderr


def test_the_cost_of_mask_training_is_at_the_steps_of_imp(tmp_path):
    whole = lines("tamt_cost", tmp_path, SEEDS="1", TASKS="rte", RUNS="1", SPARSITIES="70", OBJECTIVES="kd")
    assert [flag(words, "--max-steps") for words in whole if words[0] == "lt_pretrain.py" and "kd" not in words] == [
        "200", "300", "500", "900", "2792",
    ]  # fmt: skip
    (run,) = {tuple(words) for words in whole if "kd" in words}
    assert flag(list(run), "--ticket-step") == "17000"
    steps = {Path(mask).name for mask in masks_of(whole, "runs/") if "level_07" not in mask}
    # six times the interval, to the nearest thousand: 1200, 1800, 3000, 5400, and 16,752, the ticket
    assert steps == {f"step_000{step}000.safetensors" for step in (1, 2, 3, 5)} | {"mask.safetensors"}


def test_losses_are_computed_without_the_flags_of_training(tmp_path):
    found = lines("tamt", tmp_path, TASKS="rte", SEEDS="1", RUNS="1", SPARSITIES="70", FLAGS="--lr 1e-4 --limit-eval 9")
    scores = [words for words in found if "--score" in words]
    assert scores
    assert not any("--lr" in words for words in scores)
    assert all("--limit-eval" in words for words in scores)


def test_few_examples_are_the_papers(tmp_path):
    whole = lines("tamt_fewshot", tmp_path, SEEDS="1")
    given = [words for words in whole if "--mask" in words]
    sizes = {task: [] for task in ("mnli", "sst2", "cola", "squad")}
    for words in given:
        few = [flag(words, "--limit-train"), flag(words, "--epochs")]
        sizes[flag(words, "--task") or "squad"].append(few)
        assert flag(words, "--limit-seed") == "run"
        assert words[words.index("--limit-train") :].count("runs_tamt_fewshot") == 1
    assert all(len(found) % 4 == 0 for found in sizes.values())  # one-shot, IMP, mlm and kd
    assert sizes["cola"][::4] == [["1000", "8"], ["2000", "8"], ["5000", None]]
    assert sizes["squad"][:8:4] == [["1000", "8"], ["5000", None]]
    assert sweep("tamt_fewshot", "--dry-run", TASKS="rte", SEEDS="1", PYTHON=stub(tmp_path)).returncode == 2


def test_heads_and_mlps_are_searched_derived_scored_and_trained_again(tmp_path):
    whole = lines("importance", tmp_path, TASKS="rte", SEEDS="1 2")
    searched = [words for words in whole if "--method" in words]
    found = {(flag(words, "--seed"), flag(words, "--method"), flag(words, "--units")) for words in searched}
    assert len(searched) == len(found) == 2 * 4
    derived = [(words[1], flag(words, "--seed"), flag(words, "--output")) for words in whole if words[0] == "scripts/derive.py"]
    masks = "runs_importance/masks/rte_"
    for seed in "12":
        assert {(kind, of, file) for kind, of, file in derived if f"_s{seed}." in file} == {
            ("random", seed, f"{masks}s_random_s{seed}.safetensors"),
            ("bad", seed, f"{masks}s_bad_s{seed}.safetensors"),
            ("random", seed, f"{masks}m_random_s{seed}.safetensors"),
            ("bad", None, f"{masks}m_bad_s{seed}.safetensors"),  # by magnitude
            ("super-random", seed, f"{masks}s_super-random_s{seed}.safetensors"),
        }
    assert len(derived) == 2 * 5 + 2  # and super and super-bad, of both seeds
    scored = {(flag(words, "--seed"), flag(words, "--mask"), flag(words, "--weights")) for words in whole if "--score" in words}
    trained = [(flag(words, "--seed"), flag(words, "--mask")) for words in whole if "--mask" in words and "--score" not in words]
    assert len(scored) == 2 * 7
    assert len(trained) == 2 * (7 + 4 + 1)  # the good ones, and random ones from random weights
    assert {(seed, mask) for seed, mask, _ in scored} <= set(trained)
    dense = {seed: {weights for of, mask, weights in scored if of == seed and "rte_s" in mask} for seed in "12"}
    assert all(len(weights) == 1 and next(iter(weights)).endswith("level_00/weights.safetensors") for weights in dense.values())
    assert dense["1"] != dense["2"]
    assert not [words for words in lines("importance", tmp_path, TASKS="rte", SEEDS="1") if "super" in words]


def test_the_released_protocol_of_heads_and_mlps(tmp_path):
    whole = lines("importance", tmp_path, TASKS="rte", SEEDS="1 2", PROTOCOL="released", FLAGS="--epochs 1 --log-every 5")
    trained = [words for words in whole if words[0] in TRAINING]
    assert all(flag(words, "--protocol") == "released" and flag(words, "--log-every") == "5" for words in trained)
    assert all(("--epochs" in words) == ("--score" not in words) for words in trained)
    assert {flag(words, "--output-dir") for words in trained} == {"runs_importance_released"}
    assert {words[1:][0] for words in whole if "binomial" in words} == {"random"}
    short = [words for words in trained if flag(words, "--batch-size") == "16" and words[-2:] == ["--epochs", "2"]]
    assert {flag(words, "--mask").split("/")[-1] for words in short} == {f"rte_m_random_s{seed}.safetensors" for seed in (1, 2)}


def test_stability_has_the_searches_of_importance_and_may_train_bad_tickets_longer(tmp_path):
    variables = {"TASKS": "rte", "SEEDS": "1 2", "SEARCHES": "s m"}
    searches = lines("stability", tmp_path, **variables)
    importance = lines("importance", tmp_path, **variables)
    assert searches == [words for words in importance if "--method" in words]
    more = [words for words in lines("stability", tmp_path, **variables, LONGER="6") if words not in importance]
    assert [(flag(words, "--mask"), words[-2:]) for words in more] == [
        (f"runs_importance/masks/rte_s_bad_s{seed}.safetensors", ["--epochs", "6"]) for seed in (1, 2)
    ]
    found = sweep("stability", "--dry-run", **variables | {"SEARCHES": "x"}, PYTHON=stub(tmp_path))
    assert (found.returncode, "SEARCHES=x: each is s, heads, mlps or m" in found.stderr) == (2, True)


def own_flags(words: list[str]) -> list[str]:
    """The flags after those that every command of a sweep has."""
    at = words.index("--method") + 2 if "--method" in words else words.index("--seed") + 2
    return words[at:]


def test_earlybert_stands_beside_the_full_bert_random_tickets_and_its_budget(tmp_path):
    whole = lines("earlybert", tmp_path, TASKS="sst2 squad", SEEDS="1 2")
    assert [own_flags(words) for words in whole if flag(words, "--seed") == "2"] == [
        ["--levels", "1", "--batch-size", "128"], [], ["--ticket", "random"], ["--ticket", "full"],
        ["--levels", "1", "--batch-size", "48"], [], ["--ticket", "random"], ["--ticket", "full"],
    ]  # fmt: skip
    assert [flag(words, "--method") for words in whole] == [None, *["early-bird"] * 3] * 4
    assert len(lines("earlybert", tmp_path)) == 5 * 3 * 4
    small = lines("earlybert", tmp_path, TASKS="sst2 squad", SEEDS="1", FLAGS="--batch-size 8", EARLY_FLAGS="--draw-at 5")
    assert [words.count("--batch-size") for words in small] == [1] * 8
    assert [flag(words, "--draw-at") for words in small] == [None, "5", None, "5"] * 2
    early = "--search-lr 1e-4 --lambda-heads=1e-3 --neurons 0.3 --execution masked --draw_when stable"  # no search, no flag of it
    early += " --no-whole-search --keep-gates"
    assert [own_flags(words) for words in lines("earlybert", tmp_path, TASKS="rte", SEEDS="1", EARLY_FLAGS=early)][1:] == [
        early.split(),
        ["--neurons", "0.3", "--execution", "masked", "--keep-gates", "--ticket", "random"],
        ["--neurons", "0.3", "--ticket", "full"],
    ]  # fmt: skip


def test_heads_only_and_the_released_protocol_of_earlybert(tmp_path):
    heads = lines("earlybert", tmp_path, SEEDS="1", HEADS_ONLY="1")
    assert [flag(words, "--task") for words in heads[::4]] == ["mnli", "qnli", "qqp", "sst2", "cola", "rte", "mrpc"]
    assert [flag(words, "--neurons") for words in heads[:4]] == [None, "0", "0", "0"]
    released = lines("earlybert", tmp_path, TASKS="rte", SEEDS="1", PROTOCOL="released")
    assert [flag(words, "--protocol") for words in released] == [None, *["released"] * 3]
    assert {flag(words, "--output-dir") for words in released} == {"runs_earlybert_released"}
    ablated = lines("earlybert_ablations", tmp_path, TASKS="rte", SEEDS="1", PROTOCOL="released")
    assert {flag(words, "--output-dir") for words in ablated} == {"runs_earlybert_released"}


def test_ablations_vary_one_thing_and_leave_out_what_the_preset_has(tmp_path):
    whole = [words for words in lines("earlybert_ablations", tmp_path, SEEDS="1 2") if flag(words, "--seed") == "1"]
    found = [own_flags(words) for words in whole]
    names = [tuple(flags[::2]) for flags in found]
    assert (names.count(("--heads", "--neurons")), names.count(("--heads",)), names.count(("--neurons",))) == (6, 3, 2)
    assert [flags for flags in found if "--neuron-scope" in flags] == [
        [*neurons, "--neuron-scope", "layer"] for neurons in (["--neurons", "0.3"], [], ["--neurons", "0.5"])
    ]
    assert [flags[1::2] for flags in found if "--lambda-heads" in flags] == [["1e-3", "1e-3"], ["1e-2", "1e-2"]]
    rates = {(flag(flags, "--epochs"), flag(flags, "--lr")) for flags in found if {"--epochs", "--lr"} & {*flags}}
    assert rates == {("1", rate) for rate in ("2e-5", None, "6e-5", "8e-5")} | {(None, rate) for rate in ("2e-5", "6e-5", "8e-5")}
    assert found[-1] == ["--whole-search", "--record-epochs", "2.5"]
    assert len(found) == 1 + 12 + 3 + 2 + 7 + 1
    squad = [own_flags(words) for words in lines("earlybert_ablations", tmp_path, SEEDS="1", TASKS="squad")]
    assert ["--epochs", "2", "--lr", "4e-5"] in squad


def test_ablations_give_the_presets_value_where_a_variable_gives_another(tmp_path):
    variables = {"SEEDS": "1", "GLUE_FLAGS": "--lr 1e-4", "EARLY_FLAGS": "--heads=1/2 --lambda_heads 1e-2"}
    found = [own_flags(words) for words in lines("earlybert_ablations", tmp_path, **variables)][1:]
    assert all(flag(flags, "--heads") in ("1/4", "1/3", "5/12", "1/2") for flags in found[:4])
    assert {flag(flags, "--lambda-heads") for flags in found if "--lambda-heads" in flags} == {"1e-4", "1e-3", "1e-2"}
    rates = [(flag(flags, "--epochs"), flag(flags, "--lr")) for flags in found if "--lr" in flags]
    assert rates == [(epochs, rate) for epochs in ("1", None) for rate in ("2e-5", "4e-5", "6e-5", "8e-5")]


def test_slim_pretrained_networks_are_fine_tuned_beside_their_dense_twin(tmp_path):
    whole = lines("earlybert_pretrain", tmp_path, SEEDS="1", TASKS="rte squad", MODEL="m")
    made = [words for words in whole if words[0] == "lt_pretrain.py"]
    assert [(flag(words, "--method"), flag(words, "--ticket"), flag(words, "--levels")) for words in made] == [
        (None, None, "1"), ("early-bird", None, None), ("early-bird", "full", None),
    ]  # fmt: skip
    assert all(flag(words, "--model") == "m" and flag(words, "--init") == "random" and "--keep-models" in words for words in made)
    tuned = [words for words in whole if words[0] != "lt_pretrain.py"]
    models = [flag(words, "--model") for words in tuned]
    assert [model.split("/", 2)[2] for model in models] == [f"level_0{level}/model" for level in (0, 0, 1, 1, 1, 1)]
    assert len({*models}) == 3
    assert [flag(words, "--execution") for words in tuned] == [None, None, "slim", "slim", None, None]
    assert flag(tuned[2], "--mask") == models[2].replace("level_01/model", "level_00/mask.safetensors")

"""A ticket found by any of the three scripts trains under any of them; as do one-shot tickets and perturbed weights."""

import pytest
from test_session import SCRIPTS

from bert_tickets.cli import parse
from bert_tickets.files import sha256_of
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import encoder_weights
from bert_tickets.runs.session import Run


@pytest.fixture(scope="module")
def tickets(commands, tmp_path_factory):
    """The ticket of each script's task, 30 % removed."""
    found, folder = {}, tmp_path_factory.mktemp("sources")
    for script, (module, preset) in SCRIPTS.items():
        cfg = parse(preset, None, [*commands[script], *f"--levels 2 --rate 0.3 --output-dir {folder}".split()])
        module.main(cfg)
        found[script] = Run(cfg, preset).level_dir(1) / "mask.safetensors"
    return found


def transfer(target: str, commands, folder, *words: object):
    """What training a ticket on the target's task says: (mask, result)."""
    module, preset = SCRIPTS[target]
    cfg = parse(preset, None, [*commands[target], *f"--output-dir {folder}".split(), *map(str, words)])
    module.main(cfg)
    run = Run(cfg, preset)
    (result,) = run.results()
    return Mask.load(run.level_dir(0) / "mask.safetensors"), result


@pytest.mark.parametrize("target", SCRIPTS)
@pytest.mark.parametrize("source", SCRIPTS)
def test_any_ticket_trains_on_any_task(tickets, commands, bert_dir, tmp_path, source, target):
    ticket = Mask.load(tickets[source])
    mask, result = transfer(target, commands, tmp_path, "--mask", tickets[source])
    assert mask == ticket
    weights = {
        name: p.detach().clone() for name, p in encoder_weights(load_bert(str(bert_dir), "qa", "pretrained", 0)[0]).items()
    }
    ticket.apply(weights)
    assert result["init_sha256"] == sha256_of(weights)  # the ticket's mask over theta_0, whatever the head
    assert result["sparsity"] == pytest.approx(0.3, abs=1e-3)


def test_tickets_of_different_tasks_differ_and_cover_the_same(tickets):
    masks = [Mask.load(path) for path in tickets.values()]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert 0 < mask.distance(other) < 0.2  # mostly theta_0's own small weights, after so few steps


@pytest.mark.parametrize("target", SCRIPTS)
def test_oneshot_tickets_and_perturbed_weights_go_anywhere(target, commands, bert_dir, tmp_path, run_script):
    made = run_script("oneshot.py", *f"--rate 0.4 --method random --model {bert_dir} --output random.safetensors".split())
    assert made.returncode == 0, made.stderr
    spoilt = run_script("perturb_weight.py", *f"--shuffle entries --model {bert_dir} --output shuffled.safetensors".split())
    assert spoilt.returncode == 0, spoilt.stderr
    words = ["--mask", tmp_path / "random.safetensors", "--init", tmp_path / "shuffled.safetensors"]
    mask, result = transfer(target, commands, tmp_path, *words)
    assert mask.sparsity == pytest.approx(0.4, abs=1e-3)
    plain = transfer(target, commands, tmp_path, *words[:2])[1]
    assert plain["init_sha256"] != result["init_sha256"]


@pytest.mark.parametrize("target", ["lt_squad.py", "lt_pretrain.py"])
def test_a_mask_of_another_network_is_refused_by_name(target, commands, tickets, tmp_path):
    from bert_tickets.errors import UserError

    mask = Mask.load(tickets["lt_glue.py"])
    smaller = Mask({name: kept for name, kept in mask.items() if "pooler" not in name})  # as of a model without one
    smaller.write(tmp_path / "smaller.safetensors")
    with pytest.raises(UserError, match=r"bert\.pooler\.dense\.weight"):
        transfer(target, commands, tmp_path, "--mask", tmp_path / "smaller.safetensors")

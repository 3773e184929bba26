"""Perturbed weights, and the script that writes them as a file for --init."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel

import perturb_weight
from bert_tickets.cli import run_command
from bert_tickets.content import fingerprint
from bert_tickets.errors import UserError
from bert_tickets.files import read_facts, sha256_of
from bert_tickets.methods.perturb import layer_order, perturb, shuffled_entries, shuffled_layers, spread
from bert_tickets.modeling.parameters import PRUNABLE

HOWS = ("layers", "matrices", "entries", "noise")
CONFIG = BertConfig(
    vocab_size=30, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, max_position_embeddings=16
)


@pytest.fixture(scope="module")
def net() -> BertModel:
    """Four layers, of which no tensor equals another's."""
    net = BertModel(CONFIG).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0.3, 0.2, generator=generator)
    return net


@pytest.fixture
def theta(net) -> dict[str, Tensor]:
    return {"bert." + name: p for name, p in net.named_parameters()}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrices(theta: dict[str, Tensor]) -> list[str]:
    return [name for name in theta if PRUNABLE["matrices"].fullmatch(name)]


def changed(theta: dict[str, Tensor], perturbed: dict[str, Tensor]) -> set[str]:
    assert list(theta) == list(perturbed)
    return {name for name in theta if not torch.equal(theta[name], perturbed[name])}


# ---- entries ----


def test_entries_are_shuffled_within_each_matrix_and_nothing_else_moves(theta):
    shuffled = shuffled_entries(theta, seeded(1))
    assert len(matrices(theta)) == 4 * 6 + 1
    assert changed(theta, shuffled) == set(matrices(theta))
    for name in matrices(theta):
        assert torch.equal(theta[name].flatten().sort().values, shuffled[name].flatten().sort().values), name
        stays = (theta[name] == shuffled[name]).float().mean()
        assert stays < 0.02, name  # one of n entries is expected to stay


def test_each_matrix_is_shuffled_in_an_order_of_its_own(theta):
    places = {name: torch.arange(theta[name].numel()).view(theta[name].shape) for name in matrices(theta)}
    orders = {tuple(order.flatten().tolist()) for order in shuffled_entries(places, seeded(1)).values()}
    assert len(orders) == len(places)


# ---- layers ----


def test_moved_layers_are_the_network_with_its_layers_in_that_order(net, theta):
    order = [2, 0, 3, 1]
    ids = torch.arange(12).view(2, 6)
    by_weights, by_modules = copy.deepcopy(net), copy.deepcopy(net)
    by_weights.load_state_dict({name.removeprefix("bert."): t for name, t in shuffled_layers(theta, order).items()}, strict=False)
    by_modules.encoder.layer = torch.nn.ModuleList([net.encoder.layer[i] for i in order])
    with torch.no_grad():
        plain, *both = (model(ids).pooler_output for model in (net, by_weights, by_modules))
    assert torch.equal(*both)
    assert not torch.equal(plain, both[0])


def test_matrices_alone_move_as_in_the_released_code(theta):
    order = [2, 0, 3, 1]
    moved, whole = shuffled_layers(theta, order, whole=False), shuffled_layers(theta, order)
    in_layers = {name for name in matrices(theta) if ".layer." in name}
    assert changed(theta, moved) == in_layers
    assert all(torch.equal(moved[name], whole[name]) for name in in_layers)


def test_the_order_is_never_the_one_there_is_and_every_other_occurs():
    three = {f"bert.encoder.layer.{i}.output.dense.weight": torch.zeros(1) for i in range(3)}
    orders = {tuple(layer_order(three, seeded(seed))) for seed in range(100)}
    assert orders == {(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)}
    with pytest.raises(UserError, match="one layer"):
        layer_order({"bert.encoder.layer.0.output.dense.weight": torch.zeros(1)}, seeded(0))


# ---- noise ----


def test_sigma_counts_in_the_standard_deviation_of_all_matrices_about_their_common_mean(theta):
    together = torch.cat([theta[name].detach().flatten() for name in matrices(theta)]).double()
    assert spread(theta) == pytest.approx(together.std(correction=0).item(), rel=1e-12)
    noisy, facts = perturb(theta, "noise", 0.5, 1)
    assert facts["spread"] == spread(theta)
    assert changed(theta, noisy) == set(matrices(theta))
    parts = [(noisy[name] - theta[name]).flatten() / (0.5 * spread(theta)) for name in matrices(theta)]
    noise = torch.cat(parts)
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(1, rel=0.02)
    assert abs((parts[0] * parts[1]).mean()) < 4 / parts[0].numel() ** 0.5  # of two matrices independent


# ---- all of them ----


@pytest.mark.parametrize("how", HOWS)
def test_equal_seeds_give_equal_weights_and_theta_is_left_alone(theta, how):
    before = sha256_of(theta)
    one, same, other = (perturb(theta, how, 0.1, seed)[0] for seed in (1, 1, 2))
    assert sha256_of(one) == sha256_of(same) != sha256_of(other)
    assert sha256_of(theta) == before
    assert {tensor.data_ptr() for tensor in one.values()}.isdisjoint({tensor.data_ptr() for tensor in theta.values()})
    assert not any(tensor.requires_grad for tensor in one.values())
    backwards = dict(reversed(theta.items()))
    assert sha256_of(perturb(backwards, how, 0.1, 1)[0]) == sha256_of(one)


# ---- the script ----


@pytest.mark.parametrize("words", [("--shuffle", "entries"), ("--noise", "0.1")], ids=" ".join)
def test_equal_commands_write_equal_bytes_and_leave_the_checkpoint(bert_dir, tmp_path, capsys, words):
    checkpoint = (bert_dir / "model.safetensors").read_bytes()
    for output in ("one", "same"):
        given = [*words, "--model", bert_dir, "--seed", 1, "--output", tmp_path / output]
        perturb_weight.main(perturb_weight.parse([str(word) for word in given]))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "same").read_bytes()
    assert (bert_dir / "model.safetensors").read_bytes() == checkpoint
    theta = {"bert." + name: tensor for name, tensor in load_file(bert_dir / "model.safetensors").items()}
    assert load_file(tmp_path / "one").keys() == theta.keys()  # the encoder's alone
    facts = read_facts(tmp_path / "one")
    assert (facts["model"], facts["seed"]) == (fingerprint(str(bert_dir)), 1)
    assert facts["perturbed"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "one of the arguments --shuffle --noise is required"),
        (["--noise", "nan"], "must be above 0"),
        (["--noise", "1e300"], "is not finite with noise"),
        (["--shuffle", "layers", "--seed", "-1"], "must be from 0"),
        (["--shuffle", "layers", "--model", "nowhere"], "there is no folder nowhere; cannot read config.json"),
        (["--shuffle", "layers", "--output", "MODEL/model.safetensors"], "must be outside the checkpoint"),
    ],
)
def test_mistakes_exit_with_2(monkeypatch, bert_dir, tmp_path, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("MODEL", str(bert_dir)) for word in words]
    monkeypatch.setattr("sys.argv", ["perturb_weight.py", "--model", str(bert_dir), "--output", "w.safetensors", *words])
    with pytest.raises(SystemExit) as end:
        run_command(perturb_weight.main, perturb_weight.parse())
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

"""A ticket found by any of the three scripts trains under any of them; as do one-shot tickets and perturbed weights."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from trainrun import KINDS, Runs, train

from bert_tickets import load_ticket
from bert_tickets.content import fingerprint
from bert_tickets.errors import UserError
from bert_tickets.export.export import export
from bert_tickets.files import read_tensors, sha256_of, write_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.methods.oneshot import oneshot
from bert_tickets.methods.perturb import perturb
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import encoder_weights, prunable
from bert_tickets.modeling.units import lower
from bert_tickets.runs.directory import level_dir, results
from bert_tickets.runs.integrity import problems


@pytest.fixture(scope="module")
def tickets(commands, tmp_path_factory):
    """The mask file of a ticket of each script's task, 30 % pruned."""
    found, folder = {}, tmp_path_factory.mktemp("sources")
    for script in KINDS:
        run = train(script, [*commands[script], *f"--levels 2 --rate 0.3 --output-dir {folder}".split()])
        found[script] = level_dir(run, 1) / "mask.safetensors"
    return found


@pytest.fixture(scope="module")
def net(bert_dir):
    return load_bert(str(bert_dir), "classifier", "pretrained", 57)[0]


@pytest.fixture
def transfer(commands, tmp_path):
    """A function that trains a mask on a script's task: the run directory and its one result."""

    def go(mask, *more, script="lt_glue.py"):
        if isinstance(mask, Mask):
            mask.write(tmp_path / "m.safetensors")
            mask = tmp_path / "m.safetensors"
        run = train(script, [*commands[script], "--mask", mask, "--output-dir", tmp_path / "runs", *more])
        (result,) = results(run)
        return run, result

    return go


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_any_ticket_trains_on_any_task(tickets, transfer, net, source, target):
    ticket = Mask.load(tickets[source])
    run, result = transfer(tickets[source], script=target)
    found = Mask.load(level_dir(run, 0) / "mask.safetensors")
    assert found == ticket
    assert found.info == ticket.info  # where it was found, not where it trained
    start = {name: p.detach() * ticket[name] if name in ticket else p for name, p in encoder_weights(net).items()}
    assert result["init_sha256"] == sha256_of(start)  # whatever the head
    assert result["sparsity"] == pytest.approx(0.3, abs=1e-3)
    assert (result["method"], result["level"]) == ("transfer", 0)
    assert run.name.startswith(f"{result['task']}-transfer-s57-")


def test_a_oneshot_ticket_trains_from_perturbed_weights_unless_they_are_damaged(transfer, net, tmp_path):
    mask, path = oneshot(net, 0.4, "random", 3), tmp_path / "w.safetensors"
    weights, facts = perturb(encoder_weights(net), "entries", 0, 1)
    write_tensors(path, weights, facts)
    _, result = transfer(mask, "--init", path)
    assert result["sparsity"] == pytest.approx(0.4, abs=1e-3)
    assert result["init_sha256"] == sha256_of({name: w * mask[name] if name in mask else w for name, w in weights.items()})
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"w\.safetensors is damaged"):
        transfer(mask, "--init", path)


def test_a_released_mask_pt_trains_as_the_mask_it_holds(transfer, net, tmp_path):
    mask = oneshot(net, 0.5, "magnitude", 0)
    torch.save({f"{name}_mask": kept.float() for name, kept in mask.items()}, tmp_path / "mask.pt")
    (_, ours), (_, released) = transfer(mask), transfer(tmp_path / "mask.pt")
    assert ours.pop("run") != released.pop("run")  # a mask counts by its file's content
    assert ours == released


def test_masked_word_embeddings_leave_the_mlm_decoder_dense(transfer, net):
    name = "bert.embeddings.word_embeddings.weight"
    kept = torch.rand(net.get_parameter(name).shape) < 0.5
    run, _ = transfer(Mask({name: kept}), script="lt_pretrain.py")
    weights = read_tensors(level_dir(run, 0) / "weights.safetensors")
    assert (weights[name][~kept] == 0).all()
    assert (weights["cls.predictions.decoder.weight"][~kept] != 0).any()


@pytest.mark.parametrize("script", KINDS)
def test_a_mask_may_cover_biases_or_some_matrices_only_or_keep_nothing_of_one(transfer, net, script):
    bias, matrix = "bert.encoder.layer.0.intermediate.dense.bias", "bert.encoder.layer.1.output.dense.weight"
    emptied = "bert.encoder.layer.0.output.dense.weight"
    kept = {bias: torch.arange(64) % 2 == 0, matrix: torch.rand(32, 64) < 0.5, emptied: torch.zeros(32, 64, dtype=torch.bool)}
    run, result = transfer(Mask(kept), script=script)
    trained = read_tensors(level_dir(run, 0) / "weights.safetensors")
    for name, mask in kept.items():
        assert (trained[name][~mask] == 0).all()
        assert (trained[name][mask] != 0).any() == (name != emptied)
    dense = min(prunable(net).keys() - kept.keys())
    assert f"the mask does not cover 11 of the model's matrices, {dense} among them: they stay dense" in result["warnings"]
    assert f"nothing is left of {emptied}; --scope tensor ranks each matrix by itself" in result["warnings"]


def test_a_mask_of_another_checkpoint_is_warned_about_and_of_a_copy_not(transfer, net, bert_dir, tmp_path):
    mask, copy = oneshot(net, 0.5, "magnitude", 0), shutil.copytree(bert_dir, tmp_path / "copy")
    bases = [("bert-base-cased", True), (str(bert_dir), False), (str(copy), False), (fingerprint(str(copy)), False)]
    for base, warned in bases:
        _, result = transfer(Mask(mask, {"base_model": base}))
        assert any("the mask was found on" in warning for warning in result["warnings"]) == warned


@pytest.mark.parametrize(
    ("layer", "said"), [(1, "is 32 x 64 in the model and 2 x 2 in the mask"), (7, "which the model does not have")]
)
def test_a_mask_of_another_architecture_names_the_tensor(transfer, net, tmp_path, layer, said):
    name = f"bert.encoder.layer.{layer}.output.dense.weight"
    with pytest.raises(UserError, match=f"{name}.* {said}"):
        transfer(Mask(dict(Mask.ones(prunable(net))) | {name: torch.ones(2, 2, dtype=torch.bool)}))
    assert list((tmp_path / "runs").iterdir()) == []


# ---- slim execution ----


@pytest.fixture(scope="module")
def units(net):
    """A mask without three heads of layer 0, the whole attention of layer 1, its MLP, and 20 neurons of layer 0."""
    heads = torch.tensor([[True, False, False, False], [False] * 4])
    neurons = torch.arange(2 * 64).view(2, 64) >= 20
    return lower(Mask({"heads": heads, "mlps": torch.tensor([True, False]), "neurons": neurons}), dict(net.named_parameters()))


@pytest.mark.parametrize("script", KINDS)
def test_slim_execution_trains_as_masked_execution_and_writes_dense_files(transfer, units, calm_bert_dir, script):
    words = ["--model", calm_bert_dir, "--weight-decay", "0.1", "--adam-epsilon", "1e-4", "--keep-models", "--eval-steps", "4"]
    (masked, expected), (slim, found) = (transfer(units, *words, *more, script=script) for more in ([], ["--execution", "slim"]))
    assert found.pop("removed") == {"heads": 7, "neurons": 84}
    exact = ("init_sha256", "mask_sha256", "sparsity", "kept", "total", "steps", "warnings")
    assert {name: found[name] for name in exact} == {name: expected[name] for name in exact}
    assert found.keys() == expected.keys()
    assert [loss for _, loss in found["losses"]] == pytest.approx([loss for _, loss in expected["losses"]], abs=1e-4)
    for metrics, of_masked in zip(*([line["metrics"] for line in x["evaluations"]] for x in (found, expected)), strict=True):
        assert metrics == pytest.approx(of_masked, abs=1e-3)
    weights, of_masked = (read_tensors(level_dir(run, 0) / "weights.safetensors") for run in (slim, masked))
    assert list(weights) == list(of_masked)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, of_masked[name], rtol=0, atol=1e-4, msg=name)
        assert name not in units or not tensor[~units[name]].any()
    assert Mask.load(level_dir(slim, 0) / "mask.safetensors") == units
    assert problems(slim) == []
    name = "bert.encoder.layer.1.output.dense.weight"
    assert load_file(level_dir(slim, 0) / "model/model.safetensors")[name].shape == (32, 64)


def test_a_slim_run_is_exported_as_any_other(transfer, units, tmp_path):
    run, _ = transfer(units, "--execution", "slim")
    export(run, tmp_path / "ticket")
    net, _, mask = load_ticket(tmp_path / "ticket")
    trained = read_tensors(level_dir(run, 0) / "weights.safetensors")
    assert mask == units
    assert all(torch.equal(p, trained[name]) for name, p in net.named_parameters())


def test_a_slim_run_killed_again_and_again_ends_bit_identical(units, commands, tmp_path, monkeypatch):
    units.write(tmp_path / "units.safetensors")
    words = [*commands["lt_glue.py"], "--mask", str(tmp_path / "units.safetensors"), "--execution", "slim"]
    runs = Runs("lt_glue.py", [*words, "--save-steps", "2", "--eval-steps", "2"], tmp_path, monkeypatch)
    expected = runs("undisturbed")
    runs.killed_at(4, "killed")
    checkpoint = read_tensors(runs.dir("killed") / "checkpoint.safetensors")
    assert checkpoint["param/bert.encoder.layer.0.output.dense.weight"].shape == (32, 48)
    runs.killed_at(3, "killed")
    assert runs("killed") == expected
    assert problems(runs.dir("killed")) == []


def test_slim_execution_of_a_mask_without_a_whole_unit_is_refused(transfer, net, tmp_path):
    with pytest.raises(UserError, match=r"--execution slim has no effect: .*m\.safetensors prunes no head, and no 8 neurons"):
        transfer(oneshot(net, 0.3, "magnitude", 0), "--execution", "slim")
    assert list((tmp_path / "runs").iterdir()) == []

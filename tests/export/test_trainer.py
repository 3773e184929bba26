"""TicketCallback with the real `transformers.Trainer`: pruned weights and moments stay zero, and losses equal our loop's."""

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT, store_of
from golden import padded
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, Trainer, TrainerCallback, TrainingArguments

from bert_tickets import TicketCallback, load_ticket
from bert_tickets.config import Training
from bert_tickets.data.batches import Batches
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.loading import load_bert, save_model
from bert_tickets.modeling.parameters import WORD_EMBEDDINGS, prunable
from bert_tickets.tasks.create import create
from bert_tickets.training.loop import train

STEPS, DECAY, LR = 8, 0.1, 1e-3
OPTIONS = [{}, {"bf16": True}, {"fp16": True}, {"unfreeze": True}, {"optim": "sgd", "optim_args": "momentum=0.9"}]
OPTIONS += [{"gradient_accumulation_steps": 2, "max_steps": 4}]
BATCHES = Batches(store_of([*range(5, 29)] * 2), batch_size=6, seed=3)


@pytest.fixture(scope="module")
def ticket(calm_bert_dir, tmp_path_factory) -> Path:
    """Half of a BERT with a classifier, without dropout, as an exported folder. No test changes it."""
    folder = tmp_path_factory.mktemp("ticket")
    net, tokenizer = load_bert(str(calm_bert_dir), "classifier", "pretrained", 1)
    mask = prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.5)
    mask.apply(prunable(net))
    save_model(net, tokenizer, folder)
    mask.write(folder / "mask.safetensors")
    return folder


class Recorded(Trainer):
    """A Trainer on the steps' batches, in this order, which records its losses."""

    def get_train_dataloader(self) -> DataLoader:
        batches = [padded(batch) | {"labels": batch.labels} for i in range(STEPS) for batch in BATCHES.parts(i)]
        return DataLoader(batches, collate_fn=lambda alone: alone[0])

    def compute_loss(self, *arguments, **options):
        loss = super().compute_loss(*arguments, **options)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def trainer_of(model, place: Path, *callbacks: TrainerCallback, **options) -> Recorded:
    settings = {"learning_rate": LR, "weight_decay": DECAY, "max_steps": STEPS, "save_strategy": "no", **options}
    args = TrainingArguments(str(place), use_cpu=True, report_to=[], disable_tqdm=True, adam_epsilon=1e-8, **settings)
    return Recorded(model, args, callbacks=list(callbacks))


def not_zero(trainer: Trainer, mask: Mask) -> list[str]:
    """The names of weights and moments that are not zero where the mask prunes."""
    found = []
    for name, kept in mask.items():
        p = trainer.model.get_parameter(name)
        moments = [x for x in trainer.optimizer.state[p].values() if x.shape == p.shape]
        assert moments, "an optimizer without moments tests less"
        found += [name for x in (p, *moments) if x[~kept].any()]
    return found


# ---- training ----


def test_losses_and_weights_equal_our_loops(ticket, tmp_path):
    """On the same batches, with weight decay and clipping, to rounding. Without the callback they are not equal."""
    net, _ = load_bert(str(ticket), "classifier", "pretrained", 1)
    model, _, mask = load_ticket(ticket)
    net.load_state_dict(model.state_dict())
    cfg = Training(max_steps=STEPS, lr=LR, weight_decay=DECAY, precision="fp32", adam_epsilon=1e-8)
    task, plain, ours = create("rte"), BertForSequenceClassification.from_pretrained(ticket), []
    train(lambda batch: ours.append(task.loss(net, batch)) or ours[-1], dict(net.named_parameters()), BATCHES, cfg, mask=mask)
    trainer, other = trainer_of(model, tmp_path, TicketCallback(mask)), trainer_of(plain, tmp_path)
    trainer.train()
    other.train()
    assert trainer.losses == pytest.approx([loss.item() for loss in ours], rel=1e-5)
    for name, p in net.named_parameters():
        if not name.endswith("key.bias"):  # its gradient is rounding: a softmax does not depend on it
            assert torch.allclose(model.get_parameter(name), p, atol=1e-5), name
    assert other.losses != pytest.approx(trainer.losses, rel=1e-3)
    assert len(not_zero(other, mask)) == 3 * len(mask)


class Unfreeze(TrainerCallback):
    """Freezes the encoder, and unfreezes it after two steps."""

    def on_train_begin(self, args, state, control, model, **_) -> None:
        model.bert.requires_grad_(False)

    def on_step_begin(self, args, state, control, model, **_) -> None:
        model.bert.requires_grad_(state.global_step >= 2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pruned_weights_and_moments_stay_zero(ticket, tmp_path, capsys, options):
    model, _, mask = load_ticket(ticket)
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback, options = TicketCallback(mask), dict(options)
    more = [Unfreeze()] if options.pop("unfreeze", False) else []
    trainer = trainer_of(model, tmp_path, *more, callback, *more, **options)
    if "fp16" in options:  # on a GPU accelerate makes one
        trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu")
    trainer.train()
    assert "fp16" not in options or scaler.get_scale() > 1
    assert not_zero(trainer, mask) == []
    assert all((model.get_parameter(name) != begun[name])[kept].float().mean() > 0.9 for name, kept in mask.items())
    assert not any(p._backward_hooks for p in model.parameters())
    out = capsys.readouterr().out
    assert "nonzero" not in out
    assert all(callback.zeros[name].zeros == int((~kept).sum()) for name, kept in mask.items())
    assert "bert.pooler.dense.weight" in out
    assert re.search(rf"all 13 +50.0000% zero, {mask.kept:,} of {mask.total:,}\n", out)


@pytest.mark.parametrize("masked", [True, False])
def test_a_resumed_training_is_masked_and_equals_a_whole_one_bit_for_bit(ticket, tmp_path, capsys, masked):
    """Moments of a training without the mask are masked too: they would move weights without a gradient."""
    whole, _, mask = load_ticket(ticket)
    trainer_of(whole, tmp_path, *[TicketCallback(mask)] * masked, save_strategy="steps", save_steps=3).train()
    trainer = trainer_of(load_ticket(ticket)[0], tmp_path, TicketCallback(mask))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not_zero(trainer, mask) == []
    assert all(torch.equal(trainer.model.get_parameter(name), p) for name, p in whole.named_parameters()) == masked
    filled = f"the model has {mask.total - mask.kept:,} nonzero weights that the mask prunes: they are set to zero"
    assert (filled in capsys.readouterr().out) != masked


def test_a_failed_training_leaves_no_mask_to_the_next(ticket, tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            raise ZeroDivisionError

    model, _, mask = load_ticket(ticket)
    with pytest.raises(ZeroDivisionError):
        trainer_of(model, tmp_path, TicketCallback(mask), Fail()).train()
    trainer_of(model, tmp_path, TicketCallback(Mask.ones(mask))).train()
    assert all(model.get_parameter(name).all() for name in mask)


def test_a_model_around_a_bert_without_a_pooler_is_trained(ticket, tmp_path):
    """Its names have another prefix, and a BertModel's have none."""
    _, _, mask = load_ticket(ticket)

    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = BertModel.from_pretrained(ticket, add_pooling_layer=False)

        def forward(self, labels, **inputs):
            return {"loss": (self.tower(**inputs).last_hidden_state[:, 0].mean(1) - labels).square().mean()}

    model, callback = Around(), TicketCallback(mask)
    trainer_of(model, tmp_path, callback).train()
    assert [*callback.zeros] == [name for name in mask if "pooler" not in name]
    assert not any(model.get_parameter(f"tower.{name[5:]}")[~mask[name]].any() for name in callback.zeros)


WORKER = """
import os
import sys

import torch
from transformers import Trainer, TrainingArguments

from bert_tickets import TicketCallback, load_ticket

processes, child = int(sys.argv[2]), 0
if processes == 2:
    child = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(child == 0))
model, _, mask = load_ticket(sys.argv[1])
ids = torch.randint(5, 100, (48, 12), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(ids)]
args = TrainingArguments(
    ".", use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=8 // processes, max_steps=6,
    learning_rate=1e-3, weight_decay=0.1, save_strategy="no", average_tokens_across_devices=False,  # it doubles this loss
)
trainer = Trainer(model, args, train_dataset=data, callbacks=[TicketCallback(mask)])
trainer.train()
assert trainer.args.world_size == processes
for name, kept in mask.items():
    p = model.get_parameter(name)
    assert not any(x[~kept].any() for x in (p, *trainer.optimizer.state[p].values()) if x.shape == p.shape)
trainer.save_model(str(processes))
assert not child or os.waitpid(child, 0)[1] == 0
"""


def test_two_processes_train_what_one_trains_to_rounding(ticket, tmp_path, monkeypatch):
    """By DDP, and one of them prints."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["worker.py", str(ticket), "1"])
    runpy.run_path("worker.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = os.environ | together | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "worker.py", ticket, "2"]
    output = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=240).stdout
    assert output.count("the ticket's weights:") == 1
    one, two = (load_file(Path(name) / "model.safetensors") for name in "12")
    assert all(torch.allclose(two[name], p, atol=1e-5) for name, p in one.items() if "key.bias" not in name)


def test_the_example_of_the_readme_works(ticket, tmp_path, monkeypatch):
    text = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8").split("### Your own Trainer")[1]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:1]
    rows = {"sentence": ["a good film", "a bad one", "the plot was great", "awful"] * 4, "label": [1, 0, 1, 0] * 4}
    data = datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name in ("train", "validation")})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: data)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ticket, "ticket")
    exec(code, {})
    mask, weights = Mask.load("ticket/mask.safetensors"), load_file("my-bert/model.safetensors")
    assert not any(weights[name][~kept].any() for name, kept in mask.items())
    assert not torch.equal(weights[next(iter(mask))], load_file("ticket/model.safetensors")[next(iter(mask))])


# ---- refusals ----


@pytest.mark.parametrize(
    ("noise", "message"),
    [(1e-3, "weights that the mask prunes are not zero any more, such as in bert"), (torch.nan, "the training diverged")],
)
def test_what_moves_pruned_weights_is_an_error(ticket, tmp_path, noise, message):
    class Noise(TrainerCallback):
        def on_optimizer_step(self, *_, model, **__) -> None:
            model.bert.pooler.dense.weight.data.add_(noise)

    model, _, mask = load_ticket(ticket)
    trainer = trainer_of(model, tmp_path, TicketCallback(mask), Noise())
    with pytest.raises(UserError, match=message):
        trainer.train()
    assert trainer.state.global_step == 1


def test_sharded_weights_are_refused(ticket, tmp_path, monkeypatch):
    model, _, mask = load_ticket(ticket)
    trainer = trainer_of(model, tmp_path, TicketCallback(mask))
    monkeypatch.setattr(trainer.args.distributed_state, "distributed_type", "FSDP")
    with pytest.raises(UserError, match="TicketCallback needs whole weights in each process"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_a_mask_that_does_not_fit_is_refused(ticket, tmp_path):
    model, _, mask = load_ticket(ticket, BertForMaskedLM)
    other, embeddings = "bert.encoder.layer.2.output.dense.weight", model.get_parameter(WORD_EMBEDDINGS)
    for name, shape, message in ((other, (2, 2), f"{other}.*does not have"), (WORD_EMBEDDINGS, embeddings.shape, "is tied to")):
        with pytest.raises(UserError, match=message):
            trainer_of(model, tmp_path, TicketCallback(Mask({**mask, name: torch.ones(shape).bool()}))).train()

"""TicketCallback with the real `transformers.Trainer`: pruned weights and moments stay zero, and losses equal our loop's."""

import json
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
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import bert_tickets
from bert_tickets import TicketCallback, load_ticket
from bert_tickets.config import Training
from bert_tickets.data.batches import Batches
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.loading import load_bert, save_model
from bert_tickets.modeling.parameters import prunable
from bert_tickets.tasks.create import create
from bert_tickets.training.loop import Hook, train

STEPS, DECAY, LR = 8, 0.1, 1e-3
BATCHES = Batches(store_of([*range(5, 29)] * 2), batch_size=6, seed=3)


def make_ticket(bert: Path, folder: Path, head: str = "classifier", which: str = "matrices") -> Path:
    """Write half of a BERT as an exported folder."""
    net, tokenizer = load_bert(str(bert), head, "pretrained", 1)
    mask = prune(Mask.ones(prunable(net, which)), magnitude(prunable(net, which)), 0.5)
    mask.apply(prunable(net, which))
    folder.mkdir()
    save_model(net, tokenizer, folder)
    mask.write(folder / "mask.safetensors")
    return folder


@pytest.fixture(scope="module")
def ticket(calm_bert_dir, tmp_path_factory) -> Path:
    """A ticket with a classifier, without dropout. No test changes it."""
    return make_ticket(calm_bert_dir, tmp_path_factory.mktemp("tickets") / "ticket")


def padded(step: int) -> dict[str, torch.Tensor]:
    """The batch of a step, as transformers takes it."""
    batch = BATCHES[step]
    packed = {"input_ids": batch.input_ids, "token_type_ids": batch.token_type_ids}
    packed["attention_mask"] = torch.ones_like(batch.input_ids)
    rows = {key: pad_sequence(x[0].split(batch.lengths.tolist()), batch_first=True) for key, x in packed.items()}
    return {**rows, "labels": batch.labels}


class Recorded(Trainer):
    """A Trainer on the steps' batches, in this order, which records its losses."""

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader([padded(step) for step in range(STEPS)], collate_fn=lambda batches: batches[0])

    def compute_loss(self, *arguments, **options):
        loss = super().compute_loss(*arguments, **options)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def trainer_of(model, place: Path, *callbacks: TrainerCallback, optimizer=None, **options) -> Recorded:
    settings = {"learning_rate": LR, "weight_decay": DECAY, "max_steps": STEPS, "save_strategy": "no", **options}
    args = TrainingArguments(str(place), use_cpu=True, report_to=[], disable_tqdm=True, adam_epsilon=1e-8, **settings)
    return Recorded(model, args, callbacks=list(callbacks), optimizers=(optimizer, None))


def not_zero(trainer: Trainer, mask: Mask) -> list[str]:
    """The masked tensors, and those of the optimizer, that are not zero where the mask prunes."""
    found = []
    for name, kept in mask.items():
        p = trainer.model.get_parameter(name)
        moments = {key: x for key, x in trainer.optimizer.state[p].items() if x.shape == p.shape}
        assert moments, "an optimizer without moments tests less"
        found += [f"{what} {name}" for what, x in {"weight": p, **moments}.items() if x[~kept].any()]
    return found


# ---- training ----


def test_losses_and_weights_equal_our_loops(ticket, tmp_path):
    """On the same batches, with weight decay and clipping, to rounding. Masking after clipping, or not at all, is not equal."""
    net, _ = load_bert(str(ticket), "classifier", "pretrained", 1)
    model, _, mask = load_ticket(ticket)
    net.load_state_dict(model.state_dict())
    ours, cfg = [], Training(max_steps=STEPS, lr=LR, weight_decay=DECAY, precision="fp32", adam_epsilon=1e-8)

    class Losses(Hook):
        def __call__(self, loop) -> None:
            ours.append(loop.loss.item())

    task, plain = create("rte"), BertForSequenceClassification.from_pretrained(ticket)
    train(lambda batch: task.loss(net, batch), dict(net.named_parameters()), BATCHES, cfg, mask=mask, hooks=[Losses()])
    trainer, other = trainer_of(model, tmp_path, TicketCallback(mask)), trainer_of(plain, tmp_path)
    trainer.train()
    other.train()
    assert trainer.losses == pytest.approx(ours, rel=1e-5)
    for name, p in net.named_parameters():
        if not name.endswith("key.bias"):  # its gradient is rounding: a softmax does not depend on it
            assert torch.allclose(model.get_parameter(name), p, atol=1e-5), name
    assert other.losses != pytest.approx(ours, rel=1e-3)
    assert len(not_zero(other, mask)) == 3 * len(mask)


class Unfreeze(TrainerCallback):
    """Freezes the encoder, and unfreezes it after two steps."""

    def on_train_begin(self, args, state, control, model, **_) -> None:
        model.bert.requires_grad_(False)

    def on_step_begin(self, args, state, control, model, **_) -> None:
        model.bert.requires_grad_(state.global_step >= 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"fp16": True},
        {"gradient_accumulation_steps": 2, "max_steps": 4},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"unfreeze": True},
    ],
    ids=str,
)
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


def test_a_resumed_training_ends_with_the_bits_of_a_whole_one(ticket, tmp_path):
    whole, _, mask = load_ticket(ticket)
    trainer_of(whole, tmp_path, TicketCallback(mask), save_strategy="steps", save_steps=3).train()
    resumed, _, _ = load_ticket(ticket)
    trainer = trainer_of(resumed, tmp_path, TicketCallback(mask))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not_zero(trainer, mask) == []
    assert all(torch.equal(resumed.get_parameter(name), p) for name, p in whole.named_parameters())


def test_a_checkpoint_trained_without_the_mask_is_masked(ticket, tmp_path, capsys):
    """Its moments too, which would move weights without a gradient."""
    model, _, mask = load_ticket(ticket)
    trainer_of(model, tmp_path, save_strategy="steps", save_steps=3).train()
    trainer = trainer_of(load_ticket(ticket)[0], tmp_path, TicketCallback(mask))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not_zero(trainer, mask) == []
    assert (
        f"the model has {mask.total - mask.kept:,} nonzero weights that the mask prunes: they are set to"
        in capsys.readouterr().out
    )


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
import sys
import torch
from transformers import Trainer, TrainingArguments
from bert_tickets import TicketCallback, load_ticket

model, _, mask = load_ticket(sys.argv[1])
ids = torch.randint(5, 100, (48, 12), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(ids)]
args = TrainingArguments(
    ".", use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=int(sys.argv[3]), max_steps=6,
    learning_rate=1e-3, weight_decay=0.1, save_strategy="no", average_tokens_across_devices=False,  # it doubles this loss
)
trainer = Trainer(model, args, train_dataset=data, callbacks=[TicketCallback(mask)])
trainer.train()
assert trainer.args.world_size * int(sys.argv[3]) == 8
for name, kept in mask.items():
    p = model.get_parameter(name)
    assert not any(x[~kept].any() for x in (p, *trainer.optimizer.state[p].values()) if x.shape == p.shape)
trainer.save_model(sys.argv[2])
"""


def test_two_processes_train_what_one_trains_to_rounding(ticket, tmp_path, monkeypatch):
    """By DDP, and one of them prints."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["worker.py", str(ticket), "one", "8"])
    runpy.run_path("worker.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = os.environ | together | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "worker.py", ticket, "two", "4"]
    ranks = [environment | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    started = [subprocess.Popen(words, env=own, stdout=subprocess.PIPE, text=True) for own in ranks]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert "".join(outputs).count("the ticket's weights:") == 1
    one, two = (load_file(Path(name) / "model.safetensors") for name in ("one", "two"))
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


def test_an_optimizer_that_moves_pruned_weights_is_an_error(ticket, tmp_path):
    class Noise(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(1e-3)

    model, _, mask = load_ticket(ticket)
    trainer = trainer_of(model, tmp_path, TicketCallback(mask), optimizer=Noise(model.parameters(), LR))
    with pytest.raises(UserError, match="weights that the mask prunes are not zero any more, such as in bert"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_sharded_weights_are_refused(ticket, tmp_path, monkeypatch):
    model, _, mask = load_ticket(ticket)
    trainer = trainer_of(model, tmp_path, TicketCallback(mask))
    monkeypatch.setattr(trainer.args.distributed_state, "distributed_type", "FSDP")
    with pytest.raises(UserError, match="TicketCallback needs whole weights in each process"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda mask: {**mask, "bert.encoder.layer.2.output.dense.weight": torch.ones(2, 2).bool()},
            "layer.2.*does not have",
        ),
        (lambda mask: {name: kept[:-1] for name, kept in mask.items()}, "is 32 x 32 in the model and 31 x 32 in the mask"),
        (lambda mask: {"bert.embeddings.word_embeddings.weight": torch.ones(mask, dtype=bool)}, "is tied to another tensor"),
    ],
    ids=["name", "shape", "tied"],
)
def test_a_mask_that_does_not_fit_is_refused(ticket, tmp_path, change, message):
    model, _, mask = load_ticket(ticket, BertForMaskedLM)
    changed = Mask(change(model.bert.embeddings.word_embeddings.weight.shape if "tied" in message else mask))
    with pytest.raises(UserError, match=message):
        trainer_of(model, tmp_path, TicketCallback(changed)).train()


# ---- load_ticket ----


def test_the_package_offers_both_and_nothing_else():
    assert bert_tickets.TicketCallback is TicketCallback
    with pytest.raises(AttributeError, match="no attribute 'Ticket'"):
        _ = bert_tickets.Ticket


def test_a_ticket_has_the_folders_weights_and_the_head_that_is_asked_for(ticket, tokenizer, capsys):
    stored, mask = load_file(ticket / "model.safetensors"), Mask.load(ticket / "mask.safetensors")
    model, loaded, found = load_ticket(ticket)
    assert found == mask
    assert loaded("a good film").input_ids == tokenizer("a good film").input_ids
    assert type(model) is BertForSequenceClassification
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())
    assert "random" not in capsys.readouterr().out
    heads = {"classifier": (None, {"num_labels": 5}), "qa_outputs": (BertForQuestionAnswering, {})}
    for head, (kind, options) in {**heads, "": (BertModel, {})}.items():
        model, _, _ = load_ticket(str(ticket), kind, **options)
        assert (f"{head}.weight, {head}.bias are drawn at random" in capsys.readouterr().out) == bool(head)
        prefix = "" if head else "bert."
        assert all(torch.equal(p, stored[prefix + name]) for name, p in model.named_parameters() if not head or head not in name)
    assert load_ticket(ticket, BertForTokenClassification, num_labels=9)[0].classifier.out_features == 9


def test_a_pooler_beside_a_model_without_one_is_loaded(calm_bert_dir, tmp_path):
    folder = make_ticket(calm_bert_dir, tmp_path / "ticket", "mlm", "matrices+embeddings")
    pooler = load_file(folder / "pooler.safetensors")["bert.pooler.dense.weight"]
    assert torch.equal(load_ticket(folder, num_labels=2)[0].bert.pooler.dense.weight, pooler)
    assert torch.equal(load_ticket(folder, BertModel)[0].pooler.dense.weight, pooler)
    assert type(load_ticket(folder)[0]) is BertForMaskedLM
    (folder / "pooler.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no bert.pooler.dense.weight of its config.json's shape \(2 tensors"):
        load_ticket(folder, num_labels=2)


def test_weights_that_do_not_fit_the_mask_are_set_to_zero_and_a_line_says_so(calm_bert_dir, ticket, tmp_path, capsys):
    folder = tmp_path / "dense"
    net, tokenizer = load_bert(str(calm_bert_dir), "classifier", "pretrained", 1)
    folder.mkdir()
    save_model(net, tokenizer, folder)
    with pytest.raises(UserError, match=r"dense has no mask.safetensors: it is not an exported ticket. python scripts/export.py"):
        load_ticket(folder)
    mask = Mask.load(ticket / "mask.safetensors")
    mask.write(folder / "mask.safetensors")
    model, _, _ = load_ticket(folder)
    assert not any(model.get_parameter(name)[~kept].any() for name, kept in mask.items())
    assert f"has {mask.total - mask.kept:,} nonzero weights that the mask prunes" in capsys.readouterr().out


def test_what_is_not_a_ticket_is_a_sentence(ticket, tmp_path):
    with pytest.raises(UserError, match=r"nowhere has no config\.json"):
        load_ticket(tmp_path / "nowhere")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="is a run; export one of its tickets"):
        load_ticket(tmp_path)
    AutoTokenizer.from_pretrained(ticket).save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    Mask.load(ticket / "mask.safetensors").write(tmp_path / "t" / "mask.safetensors")
    with pytest.raises(UserError, match="has no weights"):
        load_ticket(tmp_path / "t")

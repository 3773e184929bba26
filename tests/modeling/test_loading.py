"""What is loaded, what of it may be pruned, and what rewinding restores."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, RobertaConfig

from bert_tickets.errors import UserError
from bert_tickets.files import sha256_of
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import encoder_weights, prunable, rewind, snapshot


def load(folder, init="pretrained", seed=0):
    return load_bert(str(folder), "classifier", init, seed)[0]


def test_prunable_weights_of_bert_base_are_the_papers():
    with torch.device("meta"):
        net = torch.nn.ModuleDict({"bert": BertModel(BertConfig())})
    weights = prunable(net)
    assert len(weights) == 73
    assert sum(p.numel() for p in weights.values()) == 85_524_480
    assert not any("embeddings" in name or "LayerNorm" in name or "bias" in name for name in weights)


def test_layers_are_counted_from_the_model(bert_dir):
    assert len(prunable(load(bert_dir))) == 2 * 6 + 1


def test_the_checkpoint_is_loaded_in_fp32_whatever_it_is_stored_in(bert_dir, tmp_path):
    shutil.copytree(bert_dir, tmp_path / "half")
    weights = load_file(bert_dir / "model.safetensors")
    save_file({k: v.half() for k, v in weights.items()}, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    net = load(tmp_path / "half")
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(net.get_parameter("bert." + name), weights[name].half().float())


def test_the_head_is_fixed_by_the_seed_and_the_encoder_is_the_checkpoints(bert_dir):
    first, same, other = load(bert_dir, seed=1), load(bert_dir, seed=1), load(bert_dir, seed=2)
    assert torch.equal(first.classifier.weight, same.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert sha256_of(encoder_weights(first)) == sha256_of(encoder_weights(other))


def test_random_weights_are_berts_initialisation(bert_dir):
    net, again = load(bert_dir, "random", 3), load(bert_dir, "random", 3)
    weights = encoder_weights(net)
    assert sha256_of(weights) == sha256_of(encoder_weights(again)) != sha256_of(encoder_weights(load(bert_dir)))
    assert abs(weights["bert.encoder.layer.1.intermediate.dense.weight"].std().item() - 0.1) < 0.01  # initializer_range
    for name, p in weights.items():
        if "LayerNorm.weight" in name:
            assert (p == 1).all()
        elif name.endswith("bias"):
            assert (p == 0).all()


def test_weights_from_a_file(bert_dir, tmp_path, capsys):
    net = load(bert_dir)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    save_file({name: torch.full_like(net.get_parameter(name), 2.0)}, tmp_path / "w.safetensors")
    changed = load(bert_dir, str(tmp_path / "w.safetensors"))
    assert (changed.get_parameter(name) == 2).all()
    assert "1 of the encoder's" in capsys.readouterr().out
    key = "bert.encoder.layer.0.attention.self.key.weight"
    assert torch.equal(changed.get_parameter(key), net.get_parameter(key))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [({"bert.pooler.dense.weight": torch.zeros(3, 3)}, "bert.pooler.dense.weight is"), ({"x": torch.zeros(1)}, "none of")],
)
def test_weights_that_do_not_fit_are_refused(bert_dir, tmp_path, tensors, words):
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=words):
        load(bert_dir, str(tmp_path / "w.safetensors"))


def test_what_is_no_bert_is_refused_in_words(bert_dir, tmp_path):
    with pytest.raises(UserError, match="no BERT checkpoint"):
        load("there-is/no-such-model")
    RobertaConfig().save_pretrained(tmp_path / "roberta")
    with pytest.raises(UserError, match="roberta"):
        load(tmp_path / "roberta")
    shutil.copytree(bert_dir, tmp_path / "words")
    for file in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / "words" / file).unlink(missing_ok=True)
    with pytest.raises(UserError):
        load(tmp_path / "words")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no BERT checkpoint"):
        load(tmp_path / "empty")


def test_a_checkpoint_with_another_head_gives_its_encoder(bert_dir, tmp_path):
    other = load_bert(str(bert_dir), "classifier", "pretrained", 0, labels=3)[0]
    other.save_pretrained(tmp_path / "three")
    shutil.copy(bert_dir / "tokenizer.json", tmp_path / "three")
    shutil.copy(bert_dir / "tokenizer_config.json", tmp_path / "three")
    net = load(tmp_path / "three")
    assert net.classifier.weight.shape == (2, 32)
    assert sha256_of(encoder_weights(net)) == sha256_of(encoder_weights(other))


def test_a_config_that_does_not_fit_its_weights_is_refused(bert_dir, tmp_path):
    shutil.copytree(bert_dir, tmp_path / "odd")
    config = tmp_path / "odd" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 48'))
    with pytest.raises(UserError, match=r"bert\.encoder.* has another shape"):
        load(tmp_path / "odd")


def test_a_damaged_checkpoint_is_refused_in_words(bert_dir, tmp_path):
    shutil.copytree(bert_dir, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load(tmp_path / "cut")


def test_a_checkpoint_without_a_pooler_gets_one_and_says_so(bert_dir, tmp_path, capsys):
    shutil.copytree(bert_dir, tmp_path / "bare")
    weights = load_file(bert_dir / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, tmp_path / "bare" / "model.safetensors", {"format": "pt"})
    first, second = load(tmp_path / "bare"), load(tmp_path / "bare")
    assert "no pooler" in capsys.readouterr().out
    assert torch.equal(first.bert.pooler.dense.weight, second.bert.pooler.dense.weight)
    assert 0.05 < first.bert.pooler.dense.weight.std() < 0.15


def test_a_snapshot_does_not_follow_the_weights(bert_dir):
    """`state_dict()` would: it aliases the live tensors, which is how the released scripts lost theta_0."""
    net = load(bert_dir)
    theta0, alias, before = snapshot(net), net.state_dict(), sha256_of(dict(net.named_parameters()))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    assert sha256_of(theta0) == before
    assert sha256_of(alias) != before


@pytest.mark.parametrize("head", [True, False])
def test_rewinding_gives_mask_times_theta0_and_the_head_if_asked(bert_dir, head):
    net = load(bert_dir)
    theta0 = snapshot(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    trained_head = net.classifier.weight.clone()
    mask = prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.4)
    rewind(net, theta0, mask, head=head)
    expected = {name: theta0[name] * mask[name] if name in mask else theta0[name] for name in encoder_weights(net)}
    assert sha256_of(encoder_weights(net)) == sha256_of(expected)
    assert torch.equal(net.classifier.weight, theta0["classifier.weight"] if head else trained_head)


def test_a_saved_model_opens_in_plain_transformers_with_the_zeros_in_place(bert_dir, tmp_path):
    from transformers import BertForSequenceClassification

    net = load(bert_dir)
    mask = prune(Mask.ones(prunable(net)), magnitude(prunable(net)), 0.7)
    mask.apply(prunable(net))
    net.save_pretrained(tmp_path / "model")
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert sha256_of(dict(plain.named_parameters())) == sha256_of(dict(net.named_parameters()))


@pytest.mark.parametrize("head", ["qa", "mlm"])
def test_other_heads_have_the_checkpoints_pooler_frozen_and_prunable(bert_dir, head):
    classifier, (net, _) = load(bert_dir), load_bert(str(bert_dir), head, "pretrained", 0)
    assert list(prunable(net)) == list(prunable(classifier))
    assert sha256_of(encoder_weights(net)) == sha256_of(encoder_weights(classifier))
    assert not any(p.requires_grad for p in net.bert.pooler.parameters())
    assert all(p.requires_grad for name, p in net.named_parameters() if not name.startswith("bert.pooler"))


def test_the_decoder_of_masked_language_modelling_is_the_embeddings(bert_dir, tmp_path, capsys):
    net, tokenizer = load_bert(str(bert_dir), "mlm", "pretrained", 0)
    assert "has no head for masked language modelling" in capsys.readouterr().out
    assert net.cls.predictions.decoder.weight is net.bert.embeddings.word_embeddings.weight
    assert net.cls.predictions.decoder.bias is net.cls.predictions.bias
    other = load_bert(str(bert_dir), "mlm", "pretrained", 1)[0]
    name = "cls.predictions.transform.dense.weight"
    assert not torch.equal(net.get_parameter(name), other.get_parameter(name))  # drawn by the seed

    net.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    capsys.readouterr()
    again = load_bert(str(tmp_path), "mlm", "pretrained", 5)[0]
    assert "no head" not in capsys.readouterr().out
    assert torch.equal(net.get_parameter(name), again.get_parameter(name))  # a pre-trained head is kept
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    fresh = load_bert(str(tmp_path), "mlm", "random", 5)[0]
    assert not torch.equal(net.get_parameter(name), fresh.get_parameter(name))


@pytest.mark.parametrize("head", ["qa", "mlm"])
def test_a_saved_model_with_a_pooler_opens_as_transformers_own(bert_dir, tmp_path, head):
    net, _ = load_bert(str(bert_dir), head, "pretrained", 0)
    net.save_pretrained(tmp_path)
    kind = {"qa": transformers.AutoModelForQuestionAnswering, "mlm": transformers.AutoModelForMaskedLM}[head]
    plain = kind.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(plain).__module__.startswith("transformers")
    ids = torch.tensor([[2, 9, 9, 3]])
    net.eval().set_attn_implementation("eager")
    assert torch.allclose(net(input_ids=ids)[0], plain.eval()(input_ids=ids)[0], atol=1e-6)

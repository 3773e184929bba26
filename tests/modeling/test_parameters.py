"""Parameters: the prunable sets, snapshots and rewinding, structured masks, and the untied MLM decoder."""

from __future__ import annotations

import copy
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig

from bert_tickets.data.batches import TokenStore
from bert_tickets.data.mlm_dataset import Corpus
from bert_tickets.data.token_cache import Tokens
from bert_tickets.errors import UserError
from bert_tickets.files import sha256_of
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.bert import classify
from bert_tickets.modeling.loading import HEADS, load_bert, save_plain
from bert_tickets.modeling.packing import Batch
from bert_tickets.modeling.parameters import (
    DECODER,
    PRUNABLE,
    WORD_EMBEDDINGS,
    encoder_weights,
    prunable,
    rewind,
    set_parameters,
    snapshot,
    untie_decoder,
)
from bert_tickets.tasks.mlm import Mlm, mask_tokens

LAYERS, HIDDEN, MLP = 12, 768, 3072
MATRICES = 85_524_480
BERT_BASE = {  # tensors, weights
    "matrices": (73, MATRICES),  # as in the paper
    "matrices+embeddings": (74, 108_965_376),  # as in TAMT
    "matrices+biases": (2 * (LAYERS * 6 + 1), MATRICES + LAYERS * (5 * HIDDEN + MLP) + HIDDEN),
    "heads": (LAYERS * 7, LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN)),
    "neurons": (LAYERS * 3, LAYERS * (2 * HIDDEN * MLP + MLP)),
}


@pytest.fixture
def net(bert_dir):
    return load_bert(str(bert_dir), "classifier", "pretrained", 0)[0]


@pytest.fixture
def mlm_net(calm_bert_dir):
    return load_bert(str(calm_bert_dir), "mlm", "pretrained", 0)[0]


# ---- prunable sets ----


@pytest.mark.parametrize("head", HEADS)
def test_prunable_sets_of_bert_base_have_the_right_size(head):
    with torch.device("meta"):
        net = HEADS[head](BertConfig())
    for which in PRUNABLE:
        weights = prunable(net, which)
        assert (len(weights), sum(p.numel() for p in weights.values())) == BERT_BASE[which]
        assert not any("LayerNorm" in name or "position" in name or "token_type" in name for name in weights)


# ---- snapshots and rewinding ----


def test_a_snapshot_does_not_follow_the_weights(net):
    """A `state_dict` does: it aliases the live tensors, so that the released scripts lose theta_0."""
    theta0, alias, before = snapshot(net), net.state_dict(), sha256_of(dict(net.named_parameters()))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    assert sha256_of(theta0) == before
    assert sha256_of(alias) != before


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("which", PRUNABLE)
def test_rewinding_sets_mask_times_theta0(net, which, head):
    theta0, mask = snapshot(net), prune(Mask.ones(prunable(net, which)), magnitude(prunable(net, which)), 0.4)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    trained_head = net.classifier.weight.clone()
    rewind(net, theta0, mask, head=head)
    expected = {name: theta0[name] * mask[name] if name in mask else theta0[name] for name in encoder_weights(net)}
    assert sha256_of(encoder_weights(net)) == sha256_of(expected)
    assert torch.equal(net.classifier.weight, theta0["classifier.weight"] if head else trained_head)


def test_parameters_of_another_network_are_a_users_error(net):
    with pytest.raises(UserError, match=r"it has no classifier.bias of shape \(2,\)"):
        set_parameters(net, dict(net.named_parameters()) | {"classifier.bias": torch.zeros(3)}, Path("weights"))


# ---- structured masks ----


def batch_of(*lengths: int) -> Batch:
    rng = np.random.default_rng(0)
    tokens = Tokens.of([rng.integers(5, 90, n).tolist() for n in lengths], [[0] * n for n in lengths])
    return TokenStore(tokens, np.zeros(len(lengths), np.int64)).batch(torch.arange(len(lengths)))


def structured(net, which: str, gone: slice) -> Mask:
    """Make a mask that prunes the rows `gone` of everything that computes a layer's units, and the columns that read them."""
    tensors: dict[str, Tensor] = {name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(net, which).items()}
    for name, kept in tensors.items():
        kept[(..., gone) if name.endswith("output.dense.weight") else gone] = False
    return Mask(tensors)


@pytest.mark.parametrize(("which", "module", "width"), [("heads", "attention.output.dense", 8), ("neurons", "output.dense", 3)])
def test_a_mask_of_whole_heads_or_neurons_equals_gating_their_activations(net, which, module, width):
    net.eval()
    batch, gone = batch_of(9, 17, 4), slice(width, 2 * width)
    masked = copy.deepcopy(net)
    structured(net, which, gone).apply(dict(masked.named_parameters()))

    def gate(_, inputs: tuple[Tensor]) -> tuple[Tensor]:
        gated = inputs[0].clone()
        gated[..., gone] = 0
        return (gated,)

    plain = classify(net, batch)
    for layer in net.bert.encoder.layer:
        layer.get_submodule(module).register_forward_pre_hook(gate)
    expected = classify(net, batch)
    assert torch.equal(classify(masked, batch), expected)
    assert not torch.allclose(plain, expected)


# ---- the untied decoder ----


def test_pruned_embeddings_leave_an_untied_decoder_dense(mlm_net):
    """And the loss is Hugging Face's, of a model whose decoder has weights of its own."""
    stream = np.random.default_rng(0).integers(5, 90, 30 * 6).astype(np.uint16)
    batch = mask_tokens(Corpus(stream, "", (2, 3), 32).batch(torch.arange(6)), [torch.Generator().manual_seed(0)], 4, 90)
    tied = Mlm().loss(mlm_net.eval(), batch)
    net, dense = mlm_net.eval(), mlm_net.cls.predictions.decoder.weight.detach().clone()
    words = prunable(net, "matrices+embeddings")
    mask = prune(Mask.ones(words), magnitude(words), 0.6)
    untie_decoder(net)
    untie_decoder(net)  # has no further effect
    mask.apply(dict(net.named_parameters()))
    assert (net.get_parameter(WORD_EMBEDDINGS)[~mask[WORD_EMBEDDINGS]] == 0).all()
    assert torch.equal(net.get_parameter(DECODER), dense)
    assert net.cls.predictions.decoder.bias is net.cls.predictions.bias
    loss = Mlm().loss(net, batch)
    assert not torch.isclose(loss, tied)
    net.set_attn_implementation("eager")
    torch.testing.assert_close(loss, golden.mlm_loss(net, batch), rtol=0, atol=1e-5)


def test_an_untied_model_is_saved_loaded_and_set_whole(mlm_net, calm_bert_dir, tmp_path):
    tokenizer = load_bert(str(calm_bert_dir), "mlm", "pretrained", 0)[1]
    untie_decoder(mlm_net)
    with torch.no_grad():
        mlm_net.get_parameter(WORD_EMBEDDINGS)[:, ::2] = 0
        mlm_net.cls.predictions.bias.normal_()
    save_plain(mlm_net, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    own, weights = load_bert(str(tmp_path), "mlm", "pretrained", 5)[0], dict(mlm_net.named_parameters())
    assert own.get_parameter(DECODER).shape == own.get_parameter(WORD_EMBEDDINGS).shape
    assert sha256_of(dict(own.named_parameters())) == sha256_of(weights)
    tied = load_bert(str(calm_bert_dir), "mlm", "pretrained", 7)[0]
    set_parameters(tied, weights, tmp_path)
    plain = HEADS["mlm"].__mro__[1].from_pretrained(tmp_path)
    ids = torch.tensor([[2, 9, 30, 3]])
    for net in (own, tied, plain):
        net.set_attn_implementation("eager")
        mlm_net.set_attn_implementation("eager")
        assert torch.equal(net.eval()(ids).logits, mlm_net.eval()(ids).logits)

"""Parameters: the prunable sets, snapshots and rewinding, structured masks, the untied MLM decoder."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import store_of
from torch import Tensor
from transformers import BertConfig

from bert_tickets.errors import UserError
from bert_tickets.files import sha256_of
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.modeling.bert import classify
from bert_tickets.modeling.loading import HEADS, load_bert, save_model
from bert_tickets.modeling.parameters import (
    PRUNABLE,
    WORD_EMBEDDINGS,
    encoder_weights,
    prunable,
    rewind,
    set_parameters,
    snapshot,
    untie_decoder,
)

LAYERS, HIDDEN, MLP = 12, 768, 3072
MATRICES = 85_524_480
BERT_BASE = {  # tensors, weights
    "matrices": (73, MATRICES),  # as in the paper
    "matrices+embeddings": (74, 108_965_376),  # as in TAMT
    "matrices+biases": (2 * (LAYERS * 6 + 1), MATRICES + LAYERS * (5 * HIDDEN + MLP) + HIDDEN),
    "layers+biases": (132, 85_008_384),  # as in Prasanna et al. 2020
    "heads": (LAYERS * 7, LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN)),
    "neurons": (LAYERS * 3, LAYERS * (2 * HIDDEN * MLP + MLP)),
}


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


@pytest.mark.parametrize("head", [True, False])
def test_rewinding_sets_mask_times_theta0_and_a_snapshot_does_not_follow_the_weights(net, head):
    """A `state_dict` does follow them, so that the released scripts lose theta_0."""
    weights = prunable(net, "matrices+biases")
    theta0, mask = snapshot(net), prune(Mask.ones(weights), magnitude(weights), 0.4)
    expected = sha256_of({name: p * mask[name] if name in mask else p for name, p in encoder_weights(net).items()})
    first_head = net.classifier.weight.clone()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    trained_head = net.classifier.weight.clone()
    rewind(net, theta0, mask, head=head)
    assert sha256_of(encoder_weights(net)) == expected
    assert torch.equal(net.classifier.weight, first_head if head else trained_head)


def test_parameters_of_another_network_are_a_users_error(net):
    with pytest.raises(UserError, match=r"it has no classifier.bias of shape \(2,\)"):
        set_parameters(net, dict(net.named_parameters()) | {"classifier.bias": torch.zeros(3)}, Path("weights"))


# ---- structured masks ----


def structured(net, which: str, gone: slice) -> Mask:
    """Make a mask that prunes the rows `gone` of everything that computes a layer's units, and the columns that read them."""
    tensors: dict[str, Tensor] = {name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(net, which).items()}
    for name, kept in tensors.items():
        kept[(..., gone) if name.endswith("output.dense.weight") else gone] = False
    return Mask(tensors)


@pytest.mark.parametrize(("which", "module", "width"), [("heads", "attention.output.dense", 8), ("neurons", "output.dense", 3)])
def test_a_mask_of_whole_heads_or_neurons_equals_gating_their_activations(net, which, module, width):
    net.eval()
    batch, gone = store_of([9, 17, 4]).batch(torch.arange(3)), slice(width, 2 * width)
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


def test_an_untied_model_is_saved_loaded_and_set_whole(bert_dir, tmp_path):
    (untied, tokenizer), (tied, _) = (load_bert(str(bert_dir), "mlm", "pretrained", seed) for seed in (0, 1))
    untie_decoder(untied)
    with torch.no_grad():
        untied.get_parameter(WORD_EMBEDDINGS)[:, ::2] = 0
        untied.cls.predictions.bias.normal_()
    save_model(untied, tokenizer, tmp_path)
    loaded, weights = load_bert(str(tmp_path), "mlm", "pretrained", 5)[0], dict(untied.named_parameters())
    set_parameters(tied, weights, tmp_path)
    for net in (loaded, tied):
        assert sha256_of(dict(net.named_parameters())) == sha256_of(weights)
        assert net.cls.predictions.decoder.bias is net.cls.predictions.bias

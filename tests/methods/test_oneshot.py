"""One-shot masks, and the script that writes them."""

import pytest
import torch

import oneshot as script
from bert_tickets.content import fingerprint
from bert_tickets.files import write_tensors
from bert_tickets.masking.mask import Mask
from bert_tickets.masking.prune import magnitude, prune
from bert_tickets.methods.oneshot import oneshot
from bert_tickets.methods.perturb import perturb
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.parameters import encoder_weights, prunable


@pytest.fixture
def net(bert_dir):
    return load_bert(str(bert_dir), "classifier", "pretrained", 0)[0]


@pytest.mark.parametrize("ranking", ["magnitude", "random"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_rate_is_exact(net, ranking, scope):
    mask = oneshot(net, 0.4, ranking, 1, scope)
    parts = list(mask.values()) if scope == "tensor" else [torch.cat([kept.flatten() for kept in mask.values()])]
    assert all(int((~kept).sum()) == round(0.4 * kept.numel()) for kept in parts)
    assert mask == oneshot(net, 0.4, ranking, 1, scope)
    assert (mask == oneshot(net, 0.4, ranking, 2, scope)) == (ranking == "magnitude")


def test_the_script_ranks_the_weights_of_init_and_writes_their_facts(net, bert_dir, tmp_path, capsys):
    weights, _ = perturb(encoder_weights(net), "entries", 0, 1)
    file, output = tmp_path / "w.safetensors", tmp_path / "m.safetensors"
    write_tensors(file, weights)
    words = f"--model {bert_dir} --init {file} --rate 0.3 --output {output}".split()
    script.main(script.parse(words))
    mask = Mask.load(output)
    assert mask == prune(Mask.ones(prunable(net)), magnitude(weights), 0.3)
    facts = {"base_model": fingerprint(str(bert_dir)), "method": "oneshot magnitude", "init": fingerprint(str(file))}
    facts |= {"seed": 57, "rate": 0.3}
    assert mask.info == facts
    assert "30.0% of" in capsys.readouterr().out
    script.main(script.parse([*words, "--prunable", "matrices+biases", "--scope", "tensor"]))
    mask = Mask.load(output)
    assert mask.info == facts | {"method": "oneshot magnitude by tensor", "prunable": "matrices+biases"}
    assert {name.split(".")[-1] for name in mask} == {"weight", "bias"}

"""What bench.py compares of heads, MLPs and neurons: networks without some of them, and passes that compute importances."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bert_tickets.bench.baselines import Case, TrainStep
from bert_tickets.errors import UserError
from bert_tickets.masking.mask import Mask
from bert_tickets.methods.importance import gate_gradients
from bert_tickets.modeling.bert import Net
from bert_tickets.modeling.packing import Batch
from bert_tickets.modeling.slim import slimmed
from bert_tickets.modeling.units import all_units, lower
from bert_tickets.training.distributed import SINGLE_PROCESS
from bert_tickets.training.evaluate import evaluate

Removed = tuple[int, float] | Path  # heads and a fraction of the neurons of each layer, or a mask file


def executions(case: Case, removed: Removed) -> dict[str, Case]:
    """Return the case without a mask, and two without some heads and neurons, masked and removed."""
    net = copy.deepcopy(case.net)
    mask = (Mask.load(removed) if isinstance(removed, Path) else _uniform(case.net, *removed)).to(case.device)
    mask.check_fits(dict(net.named_parameters()), "the model", partly=True)
    mask.apply(dict(net.named_parameters()))
    with slimmed(net, mask) as left:
        slim = replace(case, net=copy.deepcopy(net), mask=left)
    return {"full": replace(case, mask=Mask({})), "masked": replace(case, net=net, mask=mask), "slim": slim}


def _uniform(net: Net, heads: int, neurons: float) -> Mask:
    config, units = net.config, all_units(net.config, "heads+neurons")
    if heads > config.num_attention_heads:
        raise UserError(f"--slim {heads},{neurons}: the model has {config.num_attention_heads} heads a layer")
    units["heads"][:, :heads] = False
    units["neurons"][:, : round(neurons * config.intermediate_size)] = False
    return lower(units, dict(net.named_parameters()))


def evaluation(case: Case) -> TrainStep:
    """Build a function that computes the predictions for all examples of the case."""

    def predict(batch: Batch) -> Tensor:
        return case.task.predict(case.net, case.task.augment_batch(batch, 0, 0))

    return lambda _: evaluate(case.net, predict, case.store, case.precision, case.task.rows)


def importance_pass(case: Case) -> TrainStep:
    """Build a function that computes predictions and importances of heads and MLPs for all examples of the case."""
    units = all_units(case.net.config, "heads+mlps")
    net = copy.deepcopy(case.net).requires_grad_(False)
    return lambda _: gate_gradients(net, case.task, case.store, units, SINGLE_PROCESS)

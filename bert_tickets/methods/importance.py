"""Heads and MLPs of a fine-tuned network pruned by gradient importance: s-pruning of *When BERT Plays the Lottery* (Prasanna et
al. 2020). The good subnetwork is what is left; `--mask` trains it from the pre-trained weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bert_tickets.config import flag
from bert_tickets.errors import UserError
from bert_tickets.methods.finetuned import Guard, GuardedSettings, finetune, guard_score, search_set

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from bert_tickets.data.batches import Store
    from bert_tickets.masking.mask import Mask
    from bert_tickets.modeling.bert import Net
    from bert_tickets.modeling.packing import Batch
    from bert_tickets.runs.session import Session
    from bert_tickets.tasks import Task
    from bert_tickets.training.distributed import ProcessGroup

Scores = Mapping[str, "Tensor"]  # importances by kind of unit, of the shapes of a mask of units
Measured = tuple["float | None", Scores]  # a candidate's score, and the importances at its gates


def run(session: Session, s: Settings) -> None:
    """Level 0 is the fine-tuned network, level 1 its good subnetwork as it stands."""
    from bert_tickets.modeling.units import all_units, lower
    from bert_tickets.runs.journal import Journal

    weights, full = dict(session.net.named_parameters()), all_units(session.net.config, s.units)

    def lowered(units: Mask) -> Mask:
        return lower(units, weights, s.empty_bias).to(session.batches.store.device)  # the search is on the CPU

    finetune(session, s, lowered(full))
    guard, journal = Guard(s.threshold), Journal(session.run, 1)

    def measured(units: Mask) -> Measured:
        found = journal(units.sha256(), lambda: measure(session, units, s))
        return found["score"], importances(found, s)

    def found() -> tuple[Mask, dict[str, Any]]:
        session.net.requires_grad_(False)  # gradients of the gates alone
        good = lowered(search(full, measured, guard, s))
        good.apply(weights)
        return good, {"passes": guard.passes}

    session.train_level(1, lowered(full), steps=0, found=found)


def search(full: Mask, measured: Callable[[Mask], Measured], guard: Guard, s: Settings) -> Mask:
    """Drop the least important units while the guard accepts; returns what it accepted last.

    First heads and MLPs together, then from there only heads, then only MLPs. The first drop of a phase goes by the importances
    of the candidate that was rejected just before.
    """
    accepted, dropped = full, dict[str, list[int]]()
    score, scores = measured(full)
    go_on = guard(score, _words(full), **_facts(full, s.units, dropped))
    for phase, counts in s.phases(full):
        while go_on:
            candidate = drop(accepted, scores, counts)
            if candidate is None:  # nothing is left of a kind
                break
            score, scores = measured(candidate)
            dropped = {kind: (accepted[kind] & ~kept).flatten().nonzero().flatten().tolist() for kind, kept in candidate.items()}
            go_on = guard(score, f"{phase}: {_words(candidate)}", **_facts(candidate, phase, dropped))
            accepted = candidate if go_on else accepted
        go_on = True
    return accepted


def drop(units: Mask, scores: Scores, counts: Mapping[str, int]) -> Mask | None:
    """Drop the least important kept units of each kind, as many as there are up to `counts`; None if a kind has none left."""
    from bert_tickets.masking.mask import Mask
    from bert_tickets.masking.prune import prune

    left = dict(units)
    for kind, count in counts.items():
        if not (kept := int(units[kind].count_nonzero())):
            return None
        left |= prune(Mask({kind: units[kind]}), scores, min(count, kept) / kept)
    return Mask(left)


def measure(session: Session, units: Mask, s: Settings) -> dict[str, Any]:
    """Score the network under gates, and add up the gradients of the examples' losses: one pass over the search set, in fp32."""
    from bert_tickets.masking.importance import accumulate

    task, (split, store) = session.task, search_set(session, s)
    logits, gradients = gate_gradients(session.net, task, store, units, session.run.group)
    score = guard_score(task.compute_metrics({split: logits}, {split: store}))
    added = {kind: accumulate(gradients[kind].double(), s.accumulate, s.search_batch_size) for kind in units}
    return {"score": score, **{kind: raw.tolist() for kind, raw in added.items()}}


def gate_gradients(net: Net, task: Task, store: Store, units: Mask, group: ProcessGroup) -> tuple[ndarray, dict[str, Tensor]]:
    """Compute the logits of n examples under gates, [n, labels], and the gradients of each example's loss: of the heads [n, L, A]
    and of the MLPs [n, L]. One forward and one backward pass a batch, the latter to the gates alone."""
    import numpy as np
    import torch

    from bert_tickets.modeling.bert import classify
    from bert_tickets.modeling.gates import Gates
    from bert_tickets.training.evaluate import EVAL_TOKENS, evaluate

    def predict(batch: Batch) -> Tensor:
        with torch.enable_grad():
            gates = Gates.of(units, net, len(batch.lengths))
            logits = classify(net, batch, gates)
            total = task.loss_of(logits, batch.labels) * len(batch.lengths)  # type: ignore[attr-defined]
            return torch.cat([logits.detach(), *(found.flatten(1) for found in gates.gradients(total))], 1)

    tokens = EVAL_TOKENS[store.device.type] // 4  # the backward pass keeps activations
    rows = evaluate(net, predict, store, "fp32", "example", group, tokens)
    layers, heads = net.config.num_hidden_layers, net.config.num_attention_heads
    logits, of_heads, of_mlps = np.split(rows, [-layers * (heads + 1), -layers], 1)
    return logits, {"heads": torch.from_numpy(of_heads).unflatten(1, (layers, heads)), "mlps": torch.from_numpy(of_mlps)}


def importances(found: Mapping[str, Any], s: Settings) -> Scores:
    """Normalize the importances of `measure`. Pruned units take part in it."""
    import torch

    from bert_tickets.masking.importance import normalize

    kinds = {kind: torch.tensor(found[kind], dtype=torch.float64) for kind in s.units.split("+")}
    return {kind: normalize(raw, by_layer=kind == "heads" and s.normalize == "layer") for kind, raw in kinds.items()}


def _facts(units: Mask, phase: str, dropped: Mapping[str, list[int]]) -> dict[str, Any]:
    return {"phase": phase, "dropped": dict(dropped), **{kind: int(kept.count_nonzero()) for kind, kept in units.items()}}


def _words(units: Mask) -> str:
    return ", ".join(f"{int(kept.count_nonzero())} of {kept.numel()} {kind}" for kind, kept in units.items())


@dataclass(frozen=True, kw_only=True)
class Settings(GuardedSettings):
    """The flags of `--method importance`."""

    units: Literal["heads+mlps", "heads", "mlps"] = flag("which units are pruned", "heads+mlps")
    head_fraction: float = flag("fraction of all heads that are dropped at a time; half of it in the phase of heads only", 0.1)
    accumulate: Literal["example", "batch", "reference"] = flag(
        "add up |gradients| of examples, of batches, or of running sums over batches, as the released code does", "example"
    )
    normalize: Literal["layer", "none"] = flag("divide the importances of a layer's heads by their L2 norm", "layer")
    search_batch_size: int = flag("examples of a batch of --accumulate batch and reference", 64)
    empty_bias: Literal["keep", "drop"] = flag("the attention's output bias of a layer that has no heads left", "keep")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.head_fraction <= 1:
            raise UserError(f"--head-fraction {self.head_fraction}: must be above 0 and at most 1")
        if self.search_batch_size < 1:
            raise UserError(f"--search-batch-size {self.search_batch_size}: must be at least 1")

    def check_given(self, given: Collection[str]) -> None:
        """Raise `UserError` for a flag without effect."""
        super().check_given(given)
        if self.accumulate == "example" and "search_batch_size" in given:
            raise UserError("--search-batch-size has no effect with --accumulate example")
        if self.units == "mlps" and (unused := {"head_fraction", "normalize", "empty_bias"} & {*given}):
            raise UserError(f"--{min(unused).replace('_', '-')} has no effect with --units mlps")

    def phases(self, full: Mask) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield the phases of the search, with the number of units of each kind that are dropped at a time."""
        heads = max(1, int(self.head_fraction * full["heads"].numel())) if "heads" in full else 0
        yield self.units, {"heads": heads, "mlps": 1} if self.units == "heads+mlps" else {self.units: heads or 1}
        if self.units == "heads+mlps":
            if heads // 2:
                yield "heads", {"heads": heads // 2}
            yield "mlps", {"mlps": 1}

    def plan(self) -> list[str]:
        """Return the lines that --dry-run prints."""
        first = "fine-tune the dense network" if self.weights is None else f"take the trained weights {self.weights}"
        kinds = self.units.replace("mlps", "MLPs").replace("+", " and ")
        return [f"level 0: {first}", f"level 1: drop {kinds} while the score is at least {self.threshold:.0%} of level 0's"]

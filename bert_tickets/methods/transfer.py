"""Train a given ticket once on a task: TRANSFER(source, target) of Chen et al. 2020, and the rows of Table 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bert_tickets.config import Execution, MethodSettings, flag
from bert_tickets.content import brief, fingerprint

if TYPE_CHECKING:
    from bert_tickets.masking.mask import Mask
    from bert_tickets.runs.session import Session


def run(session: Session, s: Settings) -> None:
    """Train f(m * theta, gamma) once: theta is given by --init, gamma is drawn by the seed."""
    from bert_tickets.masking.mask import Mask

    if session.finished(0):
        return
    mask = Mask.load(s.mask)
    warnings = list(_warnings(mask, session))
    mask.apply(dict(session.net.named_parameters()))
    session.train_level(0, mask.to(session.batches.store.device), execution=s.execution, warnings=warnings)


def _warnings(mask: Mask, session: Session) -> Iterator[str]:
    from bert_tickets.modeling.parameters import prunable

    base = mask.info.get("base_model")
    weights = dict(session.net.named_parameters())
    is_ticket = all(not weights[name][~kept.to(weights[name].device)].any() for name, kept in mask.items())
    # a ticket is m * theta already, as export.py --untrained writes it
    if base is not None and fingerprint(str(base)) != session.base_model and not is_ticket:
        models = f"{brief(str(base))} and is applied to {brief(session.base_model)}"
        yield f"the mask was found on {models}: are these the same weights?"
    if "units" not in mask.info and (dense := prunable(session.net).keys() - mask.keys()):  # heads, MLPs: others are not meant
        yield f"the mask does not cover {len(dense)} of the model's matrices, {min(dense)} among them: they stay dense"


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """The flags of `--method transfer`."""

    mask: str = flag("the ticket to train: a mask file, or a released mask.pt")
    execution: Execution = flag("mask the weights, or remove the heads and neurons that the mask prunes whole", "masked")  # noqa: RUF009

    def plan(self) -> list[str]:
        """Return the lines that --dry-run prints."""
        return [f"train the ticket {self.mask} once"]

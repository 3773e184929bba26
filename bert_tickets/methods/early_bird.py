"""EarlyBERT (Chen et al. 2021): coefficients of heads and neurons say early in fine-tuning which of them go. The smaller network
is trained from the weights before the search."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from bert_tickets.config import Execution, MethodSettings, flag
from bert_tickets.errors import UserError
from bert_tickets.training.schedule import linear_decay

if TYPE_CHECKING:
    from torch import Tensor

    from bert_tickets.masking.mask import Mask
    from bert_tickets.runs.session import Session


def run(session: Session, s: Settings) -> None:
    """Level 0 searches and draws the ticket, level 1 trains it."""
    if s.skip_first_batch and session.steps == 1:
        raise UserError("--skip-first-batch: the ticket's training has one step, and nothing would be trained")
    if not session.finished(0):
        search(session, s)
    train(session, s, session.restore(0))  # f(m * theta_0, gamma), as level 0 leaves it


def search(session: Session, s: Settings) -> None:
    """Level 0: train the network together with coefficients, under an L1 penalty on these, and draw the ticket from them."""
    from bert_tickets.masking.draw import FIFO, first_stable, stable
    from bert_tickets.methods.arithmetic import cost
    from bert_tickets.modeling.parameters import rewind, snapshot
    from bert_tickets.modeling.units import all_units, lower
    from bert_tickets.runs.integrity import RECORD
    from bert_tickets.training.coefficients import GatedNetwork, Record, StopWhen

    net, task, full, warnings = session.net, session.task, all_units(session.net.config, "heads+neurons"), list[str]()
    theta_0 = snapshot(net)  # and gamma, the task's head
    gated = GatedNetwork(net)  # c = 1
    record = Record(gated.coefficients, session.run.dir / RECORD)
    t, steps, horizon = (None, 0, 1) if s.ticket == "random" else s.search_steps(session)
    steps = steps if s.ticket == "early-bird" else 0

    def units_at(step: int) -> Mask:
        return s.draw(record.after(step - (s.record == "before")))

    def fires(step: int) -> bool:
        asked = range(step - (FIFO - 1) * s.draw_every, step + 1, s.draw_every)
        return asked[0] > 0 and all(stable([units_at(at) for at in asked]).values())

    def drawn() -> tuple[Mask, dict[str, Any], int]:
        if s.ticket != "early-bird":
            return full if s.ticket == "full" else random_units(session, s), {"step": 0, **dict.fromkeys(FIRED)}, 0
        taken = len(record.rows())
        first = first_stable((at, units_at(at)) for at in range(s.draw_every, taken + 1, s.draw_every))
        fired = {name: first.get(kind) for name, kind in FIRED.items()}
        step = t or fired["fired"] or taken
        if t is None and fired["fired"] is None:
            warnings.append(f"the masks were not stable by step {step}, at which the ticket was drawn")
        return units_at(step), {"step": step, **fired}, taken

    def found() -> tuple[Mask, dict[str, Any]]:
        units, facts, taken = session.run.group.on_main(drawn)
        spent = cost(session, full, 0, taken)
        return lower(units, theta_0).to(session.batches.store.device), {"draw": facts, "flops": spent, "full_flops": spent}

    session.train_level(
        0,
        lower(full, theta_0).to(session.batches.store.device),
        loss=lambda batch: gated(task.loss, batch) + gated.penalty(s.lambda_heads, s.lambda_neurons),
        predict=lambda batch: gated(task.predict, batch),
        leaves=gated.params(),
        schedule=linear_decay(s.search_lr, horizon),
        steps=steps,
        hooks=[record, *([StopWhen(s.draw_every, fires)] if t is None and not s.whole_search else [])],
        found=found,
        after=lambda mask: rewind(net, theta_0, mask),  # the search's weights are discarded
        files={"coefficients.npy": record.write} if steps else {},
        warnings=warnings,
    )


def train(session: Session, s: Settings, mask: Mask) -> None:
    """Level 1: train f(m * theta_0, gamma) without a penalty."""
    from bert_tickets.methods.arithmetic import cost, matched_steps
    from bert_tickets.modeling.slim import executed_units, kept_units
    from bert_tickets.modeling.units import all_units
    from bert_tickets.training.coefficients import GatedNetwork

    net, task, full = session.net, session.task, all_units(session.net.config, "heads+neurons")
    units = kept_units(net, mask) if s.execution == "slim" else full
    start, steps, gates = int(s.skip_first_batch), session.steps, dict[str, Any]()
    if s.ticket == "full":  # all tickets of these flags have the arithmetic of this one
        start, steps = 0, matched_steps(session, random_units(session, s), s.search_steps(session)[1], start)
    elif s.keep_gates:  # variant: coefficients of the units that are left
        gated = GatedNetwork(net, executed_units(net, mask) if s.execution == "slim" else full)
        gates = {"loss": lambda batch: gated(task.loss, batch), "predict": lambda batch: gated(task.predict, batch)}
        gates |= {"leaves": gated.params(), "after": lambda mask: gated.fold()}
    results = {"flops": cost(session, units, start, steps), "full_flops": cost(session, full, start, steps)}
    session.train_level(1, mask, execution=s.execution, start=start, steps=steps, results=results, **gates)


def random_units(session: Session, s: Settings) -> Mask:
    """Draw a random ticket: from coefficients that are uniform in [0, 1)."""
    from bert_tickets.masking.prune import random_scores
    from bert_tickets.modeling.units import all_units
    from bert_tickets.seeds import seeded

    full = all_units(session.net.config, "heads+neurons")
    return s.draw(random_scores(full, seeded(session.cfg.train.seed, "random coefficients")))


FIRED = {"fired": "all", "heads_fired": "heads", "neurons_fired": "neurons"}  # of the results: the first steps of stable masks
OF_SEARCH = {"search_lr", "search_epochs", "draw_when", "draw_every", "lambda_heads", "lambda_neurons", "record", "rank"}
OF_SEARCH |= {"whole_search", "record_epochs"}


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """The flags of `--method early-bird`."""

    search_lr: float = flag("initial learning rate of the search; --lr is that of the ticket's training, as are --epochs", 2e-5)
    search_epochs: float | None = flag(
        "length of the decay of --search-lr to zero, in epochs; if not given, the steps of the ticket's training", None
    )
    lambda_heads: float = flag("weight of the sum of the heads' |coefficients| in the loss of the search", 1e-4)
    lambda_neurons: float = flag("weight of the sum of the neurons' |coefficients|", 1e-4)
    draw_at: str = flag("step of the search after which the ticket is drawn; below 1: a part of an epoch", "0.2")
    draw_when: Literal["fixed", "stable"] = flag(
        "draw at --draw-at, or when the last of five masks is within 0.1 of each of the others, of heads and of neurons", "fixed"
    )
    draw_every: int = flag("compare the masks of every N-th step", 10)
    record: Literal["after", "before"] = flag("draw from the coefficients after the update of that step, or before it", "after")
    whole_search: bool = flag("search until --record-epochs, for maps of the masks' distances; the ticket is the same", False)
    record_epochs: float = flag(
        "epochs at which a search ends that is whole, or whose masks do not become stable; at most those of its decay", 1.0
    )
    heads: str = flag("fraction of each layer's heads that goes, such as 1/3 or 0.25", "1/3")
    neurons: float = flag("fraction of the neurons that goes", 0.4)
    neuron_scope: Literal["global", "layer"] = flag("rank the neurons of all layers together, or each layer's", "global")
    rank: Literal["magnitude", "signed"] = flag("the smallest |coefficients| go, or the smallest ones", "magnitude")
    rule: Literal["count", "quantile"] = flag(
        "round(n * fraction) of n units go, the earlier ones of equal coefficients; or all up to the quantile", "count"
    )
    ticket: Literal["early-bird", "random", "full"] = flag(
        "draw from the search; or from random coefficients; or search nothing, and train the full network for as much arithmetic",
        "early-bird",
    )
    keep_gates: bool = flag("train coefficients of the units that are left, too, from 1 and without penalty", False)
    skip_first_batch: bool = flag("leave out the first step of the ticket's training", False)
    execution: Execution = flag("remove the units that go, or mask their weights", "slim")  # noqa: RUF009
    levels = 2  # the search, and the training of its ticket

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", _fraction_text(self.heads))  # the dataclass is frozen
        object.__setattr__(self, "draw_at", _step_text(self.draw_at))
        for name in ("search_lr", "record_epochs", "search_epochs", "draw_every"):
            if (value := getattr(self, name)) is not None and not 0 < value < 1e15:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0")
        for name in ("lambda_heads", "lambda_neurons"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 0 and finite")
        if not 0 <= self.neurons <= 1:
            raise UserError(f"--neurons {self.neurons}: must be from 0 to 1")

    def check_given(self, given: Collection[str]) -> None:
        """Raise `UserError` for a flag without effect."""
        unused: dict[str, Collection[str]] = {
            f"--ticket {self.ticket}": OF_SEARCH | ({"draw_at"} if self.ticket == "random" else {"keep_gates", "execution"}),
            "--draw-when stable": {"draw_at"},
        }
        when = {f"--ticket {self.ticket}": self.ticket != "early-bird", "--draw-when stable": self.draw_when == "stable"}
        for reason, names in unused.items():
            if when[reason] and (found := {*names} & {*given}):
                raise UserError(f"--{min(found).replace('_', '-')} has no effect with {reason}")
        if "record_epochs" in given and not self.whole_search and self.draw_when == "fixed":
            raise UserError("--record-epochs has no effect without --whole-search or --draw-when stable")

    def draw(self, coefficients: Mapping[str, Tensor]) -> Mask:
        """Draw the units that are left from coefficients [L, A] and [L, I]."""
        from bert_tickets.masking.draw import draw

        fractions = {"heads": float(Fraction(self.heads)), "neurons": self.neurons}
        by_layer = {"heads"} if self.neuron_scope == "global" else {"heads", "neurons"}
        return draw(coefficients, fractions, by_layer, self.rank, self.rule)

    def draw_step(self, session: Session) -> int:
        """Return the step t of --draw-at: t itself, or round(t * examples / batch size)."""
        at = float(self.draw_at)
        return int(at) if at >= 1 else max(1, round(at * len(session.batches.store) / session.batches.batch_size))

    def search_steps(self, session: Session) -> tuple[int | None, int, int]:
        """Return the step of the draw (None: when the masks are stable), the steps of the search, and those of its decay.

        Raises `UserError` if the learning rate is zero before the draw, or if no rule can fire.
        """
        from bert_tickets.masking.draw import FIFO
        from bert_tickets.training.loop import total_steps

        def of_epochs(epochs: float) -> int:
            return total_steps(replace(session.cfg.train, epochs=epochs, max_steps=None), session.batches.per_epoch)

        horizon = session.steps if self.search_epochs is None else of_epochs(self.search_epochs)
        t, whole = self.draw_step(session) if self.draw_when == "fixed" else None, min(of_epochs(self.record_epochs), horizon)
        if t is not None and t > horizon:
            raise UserError(f"--draw-at {self.draw_at} is step {t}, and the search has {horizon} until its learning rate is zero")
        if t is None and whole < FIFO * self.draw_every:
            apart = f"{FIFO} masks that are --draw-every {self.draw_every} steps apart"
            raise UserError(f"--draw-when stable compares {apart}, and the search has {whole} steps")
        return t, whole if t is None else max(t, whole) if self.whole_search else t, horizon

    def plan(self) -> list[str]:
        """Return the lines that --dry-run prints."""
        kinds = f"{float(Fraction(self.heads)):.0%} of each layer's heads, {self.neurons:.0%} of the neurons"
        at = f"step {self.draw_at}" if float(self.draw_at) >= 1 else f"{self.draw_at} of an epoch"
        when = f"after {at}" if self.draw_when == "fixed" else "when the masks are stable"
        found = {
            "early-bird": [f"level 0: search, and draw {when}: without {kinds}", "level 1: train the ticket"],
            "random": [f"level 0: draw a random ticket: without {kinds}", "level 1: train the ticket"],
            "full": [
                "level 0: nothing",
                f"level 1: train the full network for the arithmetic of a slim ticket, drawn after {at}",
            ],
        }
        return found[self.ticket]


def _fraction_text(text: str) -> str:
    """Normalize a value of --heads, so that equal values have equal text. Raises `UserError` for an invalid one."""
    try:
        value = Fraction(text if re.fullmatch(r"[\d./]{1,20}", text) else "no fraction")  # one of 1e-99999999 takes minutes
        if 0 <= value <= 1:
            return short if Fraction(short := f"{float(value):.15g}") == value else str(value)
    except (ValueError, ZeroDivisionError):
        pass
    raise UserError(f"--heads {text}: give a fraction such as 1/3 or 0.25")


def _step_text(text: str) -> str:
    """Normalize a value of --draw-at. Raises `UserError` for an invalid one."""
    try:
        value = float(text)
        if 0 < value < 1 or (1 <= value < 2**48 and value == int(value) and "." not in text):  # 1.0 is no epoch
            return f"{value:.15g}"
    except (ValueError, OverflowError):
        pass
    raise UserError(f"--draw-at {text}: give a step such as 400, or a part of an epoch such as 0.2")

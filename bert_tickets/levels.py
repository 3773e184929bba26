"""A level under way, in its run directory: its title, its checkpoints, and what to do when asked to stop."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from bert_tickets import Diverged, Refused, Stopped, UserError
from bert_tickets.files import read_facts, read_tensors, write_tensors
from bert_tickets.runs import Run
from bert_tickets.soundness import check_tensors


class Level:
    """One level of a run, while it is trained: the `Keeper` of `train`."""

    def __init__(self, run: Run, level: int, sparsity: float) -> None:
        self.run, self.level = run, level
        self.title = ("ticket" if run.cfg.mask else f"level {level}/{run.levels - 1}") + f", {sparsity:.0%} pruned"
        self.note: dict[str, float | None] = {
            f"last {r['metric']}": r["metrics"][r["metric"]] for r in run.results()[-1:]
        }  # on the progress bar
        run.saves_on_stop = True

    @property
    def stop_requested(self) -> bool:
        return self.run.stop_signal is not None

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict] | None:
        """This level's checkpoint, if a sound one is there; a damaged one is named, and the level begins anew."""
        return self.run.ranks.spread(self._load)

    def _load(self) -> tuple[dict[str, Tensor], dict] | None:
        path = self.run.dir / "checkpoint.safetensors"
        if not path.exists():
            return None
        try:
            check_tensors(path, self.run.dir, self.level)
            return read_tensors(path), read_facts(path)
        except Refused:
            raise  # beginning again would write over it
        except UserError as error:
            print(f"{error}; level {self.level} begins again from its start")
            return None

    def save_checkpoint(self, tensors: dict[str, Tensor], facts: dict) -> None:
        path = self.run.dir / "checkpoint.safetensors"
        facts = {**facts, "run": self.run.dir.name, "level": self.level}
        self.run.ranks.first(lambda: write_tensors(path, tensors, facts))

    def divided(self, step: int, parts: int) -> None:
        """Say that memory ran out, and in how many parts batches are taken from here on."""
        print(
            f"{self.title}: out of memory in step {step}; each process takes its batches in {parts} parts from here on",
            flush=True,
        )
        if self.run.ranks.rank == 0:
            self.run.log("out of memory", level=self.level, step=step, parts=parts)

    def diverged(self, error: Diverged) -> NoReturn:
        """Write down that the level came to no result, and why; then end the run."""
        self.run.fail(self.level, str(error))
        if self.run.ranks.rank:
            raise SystemExit(2)  # the first process says it
        raise Diverged(
            f"{self.title}: {error}. It is no result, and results.jsonl says so; what was finished or saved before is intact. "
            "A lower --lr, or --precision bf16 or fp32, may help."
        ) from None

    def stopped(self, step: int) -> None:
        number = max(self.run.ranks.gather(self.run.stop_signal or 0))
        if self.run.ranks.rank:
            raise Stopped("", 128 + number)  # the first process says it
        self.run.log("stop", level=self.level, step=step)
        raise Stopped(
            f"stopped in level {self.level} after step {step}, saved in {self.run.dir}; the same command goes on from there",
            128 + number,
        )

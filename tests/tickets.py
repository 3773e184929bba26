"""Tickets that are trained once and exported, for the tests of several folders."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trainrun import Exported

from bert_tickets.export.export import export
from bert_tickets.masking.mask import Mask
from bert_tickets.modeling.loading import load_bert
from bert_tickets.modeling.units import lower

# Runs whose tickets are exported: a task, and flags. Enough steps for RTE to predict both classes.
EXPORTED = {
    "rte": ("rte", "--max-steps 30 --keep-models"),
    "stsb": ("stsb", "--prunable neurons"),  # biases, and some matrices only
    "squad": ("squad", "--keep-models"),
    "mlm": ("mlm", ""),
    "embeddings": ("mlm", "--prunable matrices+embeddings"),
}


@pytest.fixture(scope="session")
def exported(train_task: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Runs of two levels, 0 and 40 % pruned, and their newest levels, exported. No test changes them."""
    folders, found = [tmp_path_factory.mktemp(name) for name in Exported._fields], {}
    for name, (task, words) in EXPORTED.items():
        run = train_task(task, folders[0], "--levels", 2, "--rate", 0.4, *words.split())
        found[name] = Exported(run, *(folder / name for folder in folders[1:]))
        export(run, found[name].trained)
        export(run, found[name].untrained, untrained=True)
    return found


# Runs whose tickets have neither heads nor neurons in some layer.
SLIM = {"rte": "--max-steps 6", "squad": "", "mlm": ""}


@pytest.fixture(scope="session")
def slim_tickets(
    bert_dir: Path, train_task: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Exported]:
    """Runs that trained a mask of units by slim execution, exported: three heads and no neurons in one layer, no heads and 44
    neurons in the other. No test changes them."""
    folders, found = [tmp_path_factory.mktemp(name) for name in Exported._fields], {}
    units = {"heads": torch.tensor([[True, False, True, True], [False] * 4]), "neurons": torch.zeros(2, 64, dtype=torch.bool)}
    units["neurons"][1, 20:] = True
    like = dict(load_bert(str(bert_dir), "classifier", "pretrained", 0)[0].named_parameters())
    lower(Mask(units), like).write(folders[0] / "mask.safetensors")
    for task, words in SLIM.items():
        run = train_task(task, folders[0], "--mask", folders[0] / "mask.safetensors", "--execution", "slim", *words.split())
        found[task] = Exported(run, *(folder / task for folder in folders[1:]))
        export(run, found[task].trained)
        export(run, found[task].untrained, untrained=True)
    return found

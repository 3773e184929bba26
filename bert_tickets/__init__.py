"""Lottery tickets in pre-trained BERT: find them, train them, compare them.

Layers, each importing only from those below it: export, report, sweep, bench > methods > runs > training, tasks > data > modeling
> masking > the modules at this level. `README.md` in this folder describes them.
"""

import importlib
import pkgutil
from typing import Any

__version__ = "0.1.0"
__path__ = pkgutil.extend_path(__path__, __name__)  # a folder bert_tickets/ on PYTHONPATH may add methods and presets

_MODULES = {"TicketCallback": "trainer", "load_ticket": "trainer", "load": "load"}  # of export/


def __getattr__(name: str) -> Any:
    """Import what a user's own training needs at its first use: the package itself imports neither torch nor transformers."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"bert_tickets.export.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

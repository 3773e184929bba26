"""Lottery tickets in pre-trained BERT: find them, train them, compare them.

Layers, each importing only from those below it: export, report, sweep, bench > methods > runs > training, tasks > data > modeling
> masking > the modules at this level. `README.md` in this folder describes them.
"""

import pkgutil

__version__ = "0.1.0"
__path__ = pkgutil.extend_path(__path__, __name__)  # a folder bert_tickets/ on PYTHONPATH may add methods and presets

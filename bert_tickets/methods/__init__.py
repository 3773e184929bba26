"""Methods that find or train tickets, one file each.

A method `name` is a file `name.py` here and a preset `presets/name.toml`. The file has

- `Settings`, a frozen dataclass of the method's own flags (`config.flag`), derived from `config.MethodSettings`.
- `run(session, settings)`, which calls `session.train_level(level, mask)` for each level that is not finished.

`oneshot` and `perturb` are not methods: oneshot.py and perturb_weight.py call them. `main` is the entry point of the training
scripts.
"""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)  # as for the package itself

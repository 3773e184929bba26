"""Evaluate exported folders with plain transformers, without bert_tickets.

`python plain.py FOLDER ...` reads padded inputs from NAME.npz and writes the logits to NAME.npy, of each folder's name.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

BATCH = 8


@torch.inference_mode()
def main(folders: list[str]) -> None:
    for folder in folders:
        name, config = Path(folder).name, transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, config.architectures[0])
        net, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        assert next(net.parameters()).dtype == torch.float32
        inputs = {key: torch.from_numpy(array).split(BATCH) for key, array in np.load(f"{name}.npz").items()}
        logits = []
        for parts in zip(*inputs.values(), strict=True):
            found = net.eval()(**dict(zip(inputs, parts, strict=True)))
            logits.append(torch.stack([found.start_logits, found.end_logits], 2) if "start_logits" in found else found.logits)
        np.save(f"{name}.npy", torch.cat(logits).numpy())
    assert not [name for name in sys.modules if name.startswith("bert_tickets")]


if __name__ == "__main__":
    main(sys.argv[1:])

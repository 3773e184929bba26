"""Find lottery tickets in BERT on a GLUE task, or train a given one.

python lt_glue.py --task mnli                          iterative magnitude pruning, the paper's settings
python lt_glue.py --task rte --mask mask.safetensors   train that ticket once
"""

from bert_tickets.command import parse, run_command
from bert_tickets.config import Config
from bert_tickets.report import print_levels, print_plan

PRESET = "glue"


def main(cfg: Config) -> None:
    if cfg.dry_run:
        print_plan(cfg, PRESET)
        return
    from bert_tickets.lottery import finetune, imp, prepare
    from bert_tickets.mask import Mask
    from bert_tickets.runs import Run
    from bert_tickets.tasks.glue import Glue

    with Run(cfg, PRESET) as run:
        if not run.complete:
            mask = Mask.load(cfg.mask) if cfg.mask else None  # a bad file is met before the model is loaded
            setup = prepare(Glue(cfg.task), cfg, run)
            if mask is None:
                imp(setup, run)
            else:
                finetune(setup, run, mask)
        print_levels(run)


if __name__ == "__main__":
    run_command(main, parse(PRESET, __doc__))

"""Find lottery tickets in BERT on a GLUE task, or train a given one.

python lt_glue.py --task mnli                          iterative magnitude pruning, the paper's settings
python lt_glue.py --task rte --mask mask.safetensors   train that ticket once
"""

from bert_tickets.command import parse, run_command
from bert_tickets.config import Config
from bert_tickets.report import print_finished, print_plan

PRESET = "glue"


def main(cfg: Config) -> None:
    if cfg.dry_run:
        print_plan(cfg, PRESET)
        return
    if print_finished(cfg, PRESET):
        return
    from bert_tickets.lottery import run_task
    from bert_tickets.tasks.glue import Glue

    run_task(Glue(cfg.task), cfg, PRESET)


if __name__ == "__main__":
    run_command(main, parse(PRESET, __doc__))

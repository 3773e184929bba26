"""Find lottery tickets in BERT by masked language modelling on plain text, or train a given one.

python lt_pretrain.py                                  WikiText-103 from the hub, the paper's settings
python lt_pretrain.py --data-dir text/                 text/en.train and text/en.valid, plain UTF-8 of any size
python lt_pretrain.py --mask mask.safetensors          train that ticket once
"""

from bert_tickets.command import parse, run_command
from bert_tickets.config import Config
from bert_tickets.report import print_finished, print_plan

PRESET = "mlm"


def main(cfg: Config) -> None:
    if cfg.dry_run:
        print_plan(cfg, PRESET)
        return
    if print_finished(cfg, PRESET):
        return
    from bert_tickets.lottery import run_task
    from bert_tickets.tasks.mlm import Mlm

    run_task(Mlm(), cfg, PRESET)


if __name__ == "__main__":
    run_command(main, parse(PRESET, __doc__))

"""The adapter of a task, by its name."""

from bert_tickets.tasks import Task
from bert_tickets.tasks.glue import Glue
from bert_tickets.tasks.mlm import Mlm
from bert_tickets.tasks.squad import Squad


def create(name: str) -> Task:
    """Make the adapter of a task of `config.TASKS`."""
    if name == "squad":
        return Squad()
    return Mlm() if name == "mlm" else Glue(name)

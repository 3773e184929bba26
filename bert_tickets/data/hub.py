"""Errors about data: of the hub's client, and of missing local files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bert_tickets.errors import UserError, first_line


def no_data(problem: str, hub_name: str, folder: str) -> UserError:
    """Return the error for data that cannot be read, with the three ways to get them. `folder` describes the local files."""
    return UserError(
        f"{problem}\nThree ways to get the data:\n"
        f"  leave out --data-dir on a machine that reaches the hub: {hub_name} is downloaded and cached;\n"
        f"  fill the cache on another machine and set HF_HOME to a copy of it, with HF_HUB_OFFLINE=1;\n"
        f"  give --data-dir {folder}."
    )


@contextmanager
def from_hub(name: str, folder: str) -> Iterator[None]:
    """Convert any error of the block, which reads `name` by means of `datasets`, to a `UserError`."""
    try:
        yield
    except Exception as error:  # no package, offline, behind a proxy, with an incomplete cache: many types
        raise no_data(f"cannot read {name} from the hub: {first_line(error)}", name, folder) from None

"""Errors about data: of the hub's client, and of missing local files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bert_tickets.errors import UserError, first_line


def missing_data(message: str, source: str, layout: str) -> UserError:
    """Return the error for missing files, with the three ways to get them: the hub's `source`, its cache, a folder."""
    return UserError(
        f"{message}. Three ways to get it:\n"
        f"  leave out --data-dir on a machine that reaches the hub ({source});\n"
        f"  fill the cache on another machine and set HF_HOME to a copy of it, with HF_HUB_OFFLINE=1;\n"
        f"  give --data-dir {layout}."
    )


@contextmanager
def from_hub(name: str, folder: str) -> Iterator[None]:
    """Convert any error of the block, which reads `name` by means of `datasets`, to a `UserError`.

    `folder` describes the alternative, the folder for --data-dir.
    """
    try:
        yield
    except UserError:
        raise
    except ImportError:
        raise UserError(f"reading {name} from the hub needs the package datasets; or give --data-dir {folder}") from None
    except Exception as error:  # offline, behind a proxy, with an incomplete cache: the client raises many types
        raise UserError(
            f"cannot read {name} from the hub: {first_line(error)}\n"
            f"Give --data-dir {folder}, or fill the Hugging Face cache on a machine with a network."
        ) from None

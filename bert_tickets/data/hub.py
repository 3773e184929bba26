"""Data from the hub, or its cache: what the hub's client raises, in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bert_tickets.errors import UserError, first_line


@contextmanager
def from_hub(name: str, folder: str) -> Iterator[None]:
    """Read `name` in this context, `datasets` imported within it. `folder` says what --data-dir takes instead.

    Raises `UserError` for whatever goes wrong, with what else can be done.
    """
    try:
        yield
    except UserError:
        raise
    except ImportError:
        raise UserError(f"reading {name} from the hub needs the package datasets; or give --data-dir {folder}") from None
    except Exception as error:  # offline, a proxy's refusal, an incomplete cache: the hub client raises many kinds
        raise UserError(
            f"{name} could not be had from the hub: {first_line(error)}\n"
            f"Give --data-dir {folder}, or fill the Hugging Face cache where there is a network."
        ) from None

"""What reading models and data sets of the hub have in common."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any

from bert_tickets.errors import innermost

DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOTDIR, errno.EEXIST}


def patiently(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function of the hub's client, again after 1, 2 and 4 seconds if the hub answers that it is overloaded (5xx)."""
    for wait in (1, 2, 4):
        try:
            return call(*arguments, **options)
        except Exception as error:
            response = getattr(innermost(error), "response", None)
            if response is None or response.status_code < 500:
                raise
        time.sleep(wait)
    return call(*arguments, **options)


def is_of_disk(error: BaseException) -> bool:
    """Return whether an error of the hub's client is of HF_HOME's disk: no permission, no space, no such place."""
    root = innermost(error)
    if "(os error 28)" in str(root):  # of the client's part in Rust
        return True
    return isinstance(root, OSError) and (root.errno in DISK or root.filename is not None)

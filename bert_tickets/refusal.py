"""What the file system refuses, in words."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bert_tickets import Refused, UserError, first_line

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EEXIST: "where a folder is to be there is a file, or a link to nothing",
    errno.ENOTDIR: "what is to be a folder is a file",
    errno.EISDIR: "it is a folder",
}
INTACT = "What was there before is intact; the same command can be given again."
# Whatever they meet, they are the system's doing, and no bug: a script says them in a sentence.
PASSING = {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # the file may be sound
REFUSALS = PASSING | {*REASONS, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP}


def reason(error: OSError) -> str:
    """Why the file system refused."""
    return REASONS.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))


def cannot_write(path: Path, error: OSError, verb: str = "write") -> Refused:
    """The refusal of the file system, in a sentence."""
    return Refused(f"cannot {verb} {path}: {reason(error)}. {INTACT}")


def cannot_read(path: Path, error: Exception, otherwise: str = "damaged or missing") -> UserError:
    """What to say of a file that could not be read: `Refused` where it may be sound, and be read another time."""
    if isinstance(error, OSError) and error.errno in PASSING:
        return cannot_write(path, error, "read")
    return UserError(f"{path} is {otherwise}: {first_line(error)}")


def need_file(path: Path) -> None:
    """Raise `UserError` where there is something that is no file: a pipe or a device would be read for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is no file")


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """What the file system refuses in this context, as `cannot_write(path, ...)`.

    That is an `OSError`, or what a library written in Rust makes of one: safetensors a kind of its own and tokenizers a plain
    `Exception`, both ending with "(os error 28)".
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from None
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)$", str(error))
        if told is None:
            raise
        raise cannot_write(path, OSError(int(told[1]), str(error))) from None


def remove(path: Path) -> None:
    """Remove a file, if it is there; `UserError` where the file system refuses."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error, "remove") from None

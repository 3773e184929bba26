"""Errors that scripts print as one line. Any other exception is a bug and keeps its traceback."""

from __future__ import annotations


class UserError(Exception):
    """A request that cannot be fulfilled. The message gives the reason and a remedy; scripts exit with code 2."""


class Damaged(UserError):
    """A file does not match its checksum, or belongs to another run."""


class Diverged(UserError):
    """The loss or a weight is not finite, or fp16 gradients overflow at every scale."""


class Busy(UserError):
    """Another process holds the run directory. Scripts exit with code 75 (EX_TEMPFAIL)."""


class Stopped(BaseException):
    """A signal that stops, raised after everything was saved. Not an `Exception`, so that no library catches it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def first_line(error: BaseException) -> str:
    """The first line of an error's message (at most 200 characters), or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

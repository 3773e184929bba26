"""Lottery tickets in pre-trained BERT: find them, train them, compare them.

The package is flat and has floors; a module imports only from lower ones (README, "The house").
"""

__version__ = "0.1.0"


class UserError(Exception):
    """What the user asked for cannot be done; the message says what happened, and what to do.

    The entry scripts print it and exit with code 2. Anything else that escapes is a bug and keeps its traceback.
    """


class Diverged(UserError):
    """A level came to numbers that are not finite, or that fp16 does not hold; the message says which, and where. It is no
    result, and the run's results say so."""


class Busy(UserError):
    """Another process is at it now; the same command will do later. The entry scripts exit with code 75 (EX_TEMPFAIL)."""


class Refused(UserError):
    """The file system refuses to read or write what it has, for now: nothing is known to be damaged, or missing."""


class Stopped(BaseException):
    """SIGTERM or Ctrl-C, after all that can be kept was written. `code` is the process's exit status.

    Like KeyboardInterrupt no Exception: what catches every error of a library must not swallow it.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def first_line(error: Exception) -> str:
    """What an error of another library says, in a line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def brief(value: object) -> str:
    """What a file says of itself, at most 80 characters of it, none of which is a terminal's command."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 80 else text[:77] + "..."

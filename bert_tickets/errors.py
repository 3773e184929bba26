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
    """SIGTERM or Ctrl-C, raised after everything was saved. Not an `Exception`, so that no library catches it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def first_line(error: BaseException) -> str:
    """The first line of an error's message (at most 200 characters), or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def cause(error: BaseException) -> str:
    """Describe an error by its innermost cause, as one line of at most 500 characters.

    That is the innermost error of the system, of an import or of the hub. Without one it is the innermost that a library names as the
    cause: errors of lookups that happen to precede another one are none. For a refusal by the hub, the line is the hub's message.
    """
    chain, named = [error], error
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    while named.__cause__ is not None:
        named = named.__cause__
    found = next(
        (e for e in reversed(chain) if isinstance(e, OSError | ImportError) and not isinstance(e, FileNotFoundError)), named
    )
    text = " ".join(str(found).split())
    if (message := getattr(found, "server_message", None)) and (response := getattr(found, "response", None)) is not None:
        text = f"{response.status_code} {' '.join(str(message).split())}"
    elif not text or not isinstance(found, OSError | ImportError):
        text = f"{type(found).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= 500 else text[:300] + " ... " + text[-195:]

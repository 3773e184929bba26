"""Errors that scripts print as one line. Any other exception is a bug and keeps its traceback."""

from __future__ import annotations

from errno import ENOENT


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


def innermost(error: BaseException) -> BaseException:
    """Return the error at the root of a chain: the innermost one of the system (with a number) or of the hub (with its message).

    Without one it is the innermost that a library names as the cause. A failed lookup before it (ENOENT, `KeyError`) is none.
    """
    chain, named = [error], error
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    while named.__cause__ is not None and named.__cause__ in chain:
        named = named.__cause__
    system = (e for e in reversed(chain) if getattr(e, "errno", None) not in (None, ENOENT) or getattr(e, "server_message", None))
    return next(system, named)


def cause(error: BaseException) -> str:
    """Describe the innermost cause of an error in one line of at most 500 characters; for a refusal by the hub, its message."""
    root = innermost(error)
    text = " ".join(str(root).split())
    if (message := getattr(root, "server_message", None)) and (response := getattr(root, "response", None)):
        text = f"{response.status_code} {' '.join(str(message).split())}"
    elif not text or not isinstance(root, OSError | ImportError):
        text = f"{type(root).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= 500 else text[:300] + " ... " + text[-195:]

"""The command line of the entry scripts: flags from the dataclasses of `config`, and errors as sentences."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import io
import os
import resource
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

from bert_tickets import Busy, Stopped, UserError
from bert_tickets.config import Config, Training, build, flat, offered, preset_values, tasks
from bert_tickets.refusal import INTACT, REFUSALS, reason

_TYPES = typing.get_type_hints(Config) | typing.get_type_hints(Training)


def parse(preset: str, description: str | None, argv: Sequence[str] | None = None) -> Config:
    """The command line of a training script as a `Config`; exits with 2 and a sentence on a user's mistake."""
    parser = new_parser(description)
    names = tasks(preset)
    defaults = flat(Config(task=names[0])) | preset_values(preset, "paper")
    for name, f in offered(preset).items():
        _add_flag(parser, name, f, defaults[name], names)
    given = vars(parser.parse_args(hyphens(argv)))
    if "task" not in given and len(names) > 1:
        parser.error(f"--task is needed, one of {', '.join(names)}")
    given["task"] = given.get("task", names[0]).lower().replace("-", "")
    if given["task"] not in names:
        parser.error(f"there is no task {given['task']!r}; the tasks are {', '.join(names)}")
    try:
        return build(preset, given)
    except UserError as error:
        parser.error(str(error))


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that returns only what was given, so that a preset can stand behind it."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )


def hyphens(argv: Sequence[str] | None) -> list[str]:
    """The command line with `--batch_size` written `--batch-size`: both are accepted."""
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=")
        if name.startswith("--") and value == "--":  # argparse would give an empty list for it
            print(f"error: {name} needs a value, and -- is none", file=sys.stderr)
            sys.exit(2)
        words.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
    return words


def _add_flag(parser: argparse.ArgumentParser, name: str, f: dataclasses.Field, default: Any, names: Sequence[str]) -> None:
    options: dict[str, Any] = {"dest": name, "help": f.metadata["help"].replace("%", "%%")}
    kind = _TYPES[name]
    kinds = [part for part in typing.get_args(kind) if part is not type(None)] or [kind]
    if typing.get_origin(kind) is Literal:
        options["choices"] = kinds
    elif bool in kinds:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options |= {"type": kinds[0], "metavar": {str: "TEXT", int: "N", float: "X"}[kinds[0]]}
    if name == "task":
        options |= {"metavar": "TASK", "help": f"one of {', '.join(names)}"}
    elif default is not None and default is not False:
        options["help"] += f" (default: {default})"
    parser.add_argument("--" + name.replace("_", "-"), **options)


def is_launched() -> bool:
    """Whether this is one of several processes that were started to train together. WORLD_SIZE alone does not say so: some
    clusters set it for every program."""
    return "LOCAL_RANK" in os.environ and number_of("WORLD_SIZE") > 1


def number_of(variable: str) -> int:
    """A number that torchrun sets in the environment; 1 where it does not. Raises `UserError` for what is none."""
    text = os.environ.get(variable) or "1"
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"the variable {variable} is {text!r}, where torchrun sets a number: unset it, or start by torchrun")
    return int(text)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation, where this is glibc. No result depends on it.

    By itself it hands every large tensor back to the system at once, and a training step on a CPU then spends up to a
    seventh of its time on page faults, most of them for the embedding's gradient. Where the user has set glibc's variables,
    theirs hold. Where the process's memory is limited, it is the other way round: what is kept would be there for nobody else,
    and a limit once reached would stay reached.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # names of malloc.h
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
            mallopt(mmap_threshold, 2**17)  # and it stays there, where glibc by itself raises it to the sizes it meets
        else:
            mallopt(mmap_max, 0)  # large blocks from the heap as well
            mallopt(trim_threshold, -1)  # and the heap never shrinks


def run_command(main: Callable[..., None], *arguments: Any) -> NoReturn:
    """Run a script's `main` and exit: 2 with a sentence for a user's mistake, 75 where another process is at it, 128 + signal
    when stopped."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # a file's name, or what a file says, may be more than a terminal can write
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.unraisablehook = _unraisable
    try:
        main(*arguments)
        sys.stdout.flush()
    except UserError as error:
        _leave(os.EX_TEMPFAIL if isinstance(error, Busy) else 2, f"error: {error}")
    except Stopped as stop:
        _leave(stop.code, str(stop))
    except BrokenPipeError:  # the reader of `... | head` has gone
        _leave(141)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        where = error.filename or "where the output goes"  # a stream's refusal names nothing
        _leave(2, f"error: the system refuses {where}: {reason(error)}. {INTACT}")
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    _leave(0)


def _unraisable(dropped: Any) -> None:
    """A signal that came in a finaliser is no error to be shown: the run has noted it, and stops at its next step."""
    if not isinstance(dropped.exc_value, Stopped):
        sys.__unraisablehook__(dropped)


def _leave(code: int, says: str = "") -> NoReturn:
    """Exit, whatever becomes of what was printed: the interpreter's own last flush would change the exit code."""
    for stream, text in ((sys.stderr, says and says + "\n"), (sys.stdout, "")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)

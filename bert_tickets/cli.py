"""The command line of the scripts: flags from the dataclasses of `config`, and errors as one line."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import io
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn

from bert_tickets.config import (
    TASKS,
    Config,
    Training,
    build,
    deciding_flags,
    fields_of,
    methods,
    preset_values,
    settings_class,
)
from bert_tickets.errors import Busy, Stopped, UserError
from bert_tickets.files import check_utf8
from bert_tickets.signals import signal_at_parents_end

FORMATTER = argparse.RawDescriptionHelpFormatter


def parse(kind: str, description: str | None, argv: Sequence[str] | None = None) -> Config:
    """Parse the command line of the training script for a kind of task. Exits with 2 and one line for a user's mistake.

    The flags depend on `--method`; `--mask` alone means `--method transfer`, and `--score` means `--method score`.
    """
    words = [word for given in normalize_argv(argv) for word in (["--method", "score"] if given == "--score" else [given])]
    method = _method_of(words)
    # without defaults: the parser returns only the flags that were given, so that a preset can supply the rest
    parser = Parser(description=description, formatter_class=FORMATTER, argument_default=argparse.SUPPRESS)
    try:
        parser.epilog = (
            f"methods: {', '.join(methods(kind))}; --method NAME --help lists the flags of another.\n"
            "--score means --method score. Defaults are those of the other flags given, such as --protocol released."
        )
        if method not in methods(kind):
            raise UserError(f"there is no method {method} for this script; the methods are {', '.join(methods(kind))}")
        presets = _presets(words, kind, method)
        for name, f in flags(kind, method).items():
            _add_flag(parser, name, f, method, kind, presets)
        known, unknown = parser.parse_known_args(words)
        if unknown:
            raise UserError(_unknown(unknown[0], kind, method))
        given = vars(known) | {"method": method}
        if lists := [name for name, value in given.items() if isinstance(value, list)]:  # argparse drops the value "--"
            raise UserError(f"--{lists[0].replace('_', '-')}: expected one argument")
        if "task" not in given and len(TASKS[kind]) > 1:
            raise UserError(f"--task is required, one of {', '.join(TASKS[kind])}")
        given["task"] = given.get("task", TASKS[kind][0]).lower().replace("-", "")
        if given["task"] not in TASKS[kind]:
            raise UserError(f"there is no task {given['task']!r}; the tasks are {', '.join(TASKS[kind])}")
        return build(given)
    except UserError as error:
        parser.error(str(error))
    except OSError as error:  # an unreadable preset
        parser.exit(2, f"error: {error}\n")


def _method_of(words: Sequence[str]) -> str:
    """Return the method that a command line asks for."""
    parser = Parser(add_help=False)
    parser.add_argument("--method")
    parser.add_argument("--mask", nargs="?", const="")
    given, _ = parser.parse_known_args(words)
    default = Config.method if given.mask is None else "transfer"
    return (given.method or default).replace("-", "_")


def _presets(words: Sequence[str], kind: str, method: str) -> dict[str, Any]:
    """Return the presets' values for a command line: the defaults that its --help prints."""
    parser = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    deciding = {"protocol"}.union(*(deciding_flags(method, kind, name) for name in typing.get_args(_types(method)["protocol"])))
    for name in deciding:
        _add_flag(parser, name, flags(kind, method)[name], method, kind, {}).required = False
    found = vars(parser.parse_known_args(words)[0])
    given = {name: value for name, value in found.items() if not isinstance(value, list)}  # as in `parse`, which refuses these
    return preset_values(method, kind, given.get("protocol", Config.protocol), given)


def flags(kind: str, method: str) -> dict[str, dataclasses.Field]:
    """Return the fields that are flags of a script: `--task` if it has several tasks, and no flag of another kind of task."""
    absent = {"task"} if len(TASKS[kind]) == 1 else set()
    return {n: f for n, f in fields_of(method).items() if n not in absent and f.metadata["kind"] in (None, kind)}


def _unknown(word: str, kind: str, method: str) -> str:
    name = word.split("=")[0].removeprefix("--").replace("-", "_")
    names = {name, name.removeprefix("no_")}
    owners = [other for other in methods(kind) if other != method and names & flags(kind, other).keys()]
    if word.startswith("--") and owners:
        return f"{word} belongs to --method {' or '.join(owners)}, and this is --method {method}"
    return f"unrecognized argument {word}"


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations of flags, whose errors are one line, without the usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def normalize_argv(argv: Sequence[str] | None = None) -> list[str]:
    """Replace `--batch_size` by `--batch-size`, and `~` by the home folder, also in `--output-dir=~/runs`."""
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        path = os.path.expanduser(value)
        if re.match(r"~[\w.-]*(/|$)", path):
            Parser().error(f"{path}: there is no user of this name, or no home folder")
        words.append(name.replace("_", "-") + equals + path)
    return words


def _add_flag(
    parser: argparse.ArgumentParser, name: str, f: dataclasses.Field, method: str, kind: str, presets: Mapping[str, Any]
) -> argparse.Action:
    options: dict[str, Any] = {"dest": name, "help": f.metadata["help"].replace("%", "%%")}
    hint = _types(method)[name]
    kinds = [part for part in typing.get_args(hint) if part is not type(None)] or [hint]
    if typing.get_origin(hint) is Literal:
        options["choices"] = kinds
    elif bool in kinds:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options |= {"type": kinds[0], "metavar": {str: "TEXT", int: "N", float: "X"}[kinds[0]]}
    default = presets.get(name, f.default)
    if name == "task":
        options |= {"metavar": "TASK", "help": f"one of {', '.join(TASKS[kind])}"}
    elif name == "method":
        options |= {"metavar": "NAME", "help": options["help"] + f" (one of {', '.join(methods(kind))}; here: {method})"}
    elif default not in (None, False, dataclasses.MISSING):
        options["help"] += f" (default: {default})"
    options["required"] = f.default is dataclasses.MISSING and name != "task"
    return parser.add_argument("--" + name.replace("_", "-"), **options)


@functools.cache
def _types(method: str) -> dict[str, Any]:
    return typing.get_type_hints(Config) | typing.get_type_hints(Training) | typing.get_type_hints(settings_class(method))


# ---- the process ----


def run_command(main: Callable[..., None], *arguments: Any) -> NoReturn:
    """Run a script's `main` and exit: 2 with a message for a `UserError` or `OSError`, 75 if another process holds the run
    directory, 128 + signal if stopped."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # some daemons start programs without the standard streams
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w", encoding="utf-8"), sys.stderr or os.fdopen(2, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # otherwise a locale without UTF-8 raises an error
    code, message = 0, ""
    try:
        _check_system()
        if "TORCHELASTIC_RUN_ID" in os.environ:  # SIGUSR1, for example, ends torchrun, and not its processes
            signal_at_parents_end(signal.SIGTERM)
        keep_freed_memory()
        main(*arguments)
        sys.stdout.flush()
    except UserError as error:
        code, message = (os.EX_TEMPFAIL if isinstance(error, Busy) else 2), f"error: {error}"
    except Stopped as stop:
        code, message = stop.code, str(stop)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except BrokenPipeError:  # `... | head` has ended
        code = 141
    except OSError as error:
        code, message = 2, f"error: {error}. Complete files are intact; fix the cause and give the same command again."
    if message:
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout once more
    sys.exit(code)


def _check_system() -> None:
    """Raise `UserError` on Windows, and if the locale reads a path otherwise than as UTF-8, as the libraries in Rust do."""
    if not all(map(importlib.util.find_spec, ("fcntl", "resource"))):
        raise UserError("bert_tickets needs Linux or macOS: this Python has no fcntl or no resource. On Windows, use WSL.")
    for path in (*sys.argv, os.getcwd()):
        check_utf8(path)


def is_launched() -> bool:
    """Return whether torchrun started this process as one of several. (Some clusters set WORLD_SIZE for every program.)"""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation.

    By default it returns large tensors to the system, and a training step on a CPU spends up to a seventh of its time on page
    faults. Does nothing if a MALLOC_ variable or a memory limit is set.
    """
    import resource  # not on Windows, where --help should answer

    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if limited or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)  # large blocks are on the heap too
        libc.mallopt(trim_threshold, -1)  # the heap never shrinks

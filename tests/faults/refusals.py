"""A file system that refuses, in a process: one call of a kind, at one kind of file, raises `OSError` instead of doing its work.

What is refused lies in the folders `runs` and `cache` of the working directory; all else is left alone. Python's own calls are
replaced: `open`, a raw write (half of which is done), `os.fsync` and so on. What writes in Rust raises what it raises there.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

PLACES = ("runs", "cache")
# Kinds of files by their path below the working directory; the first that fits.
KINDS = {
    "the token cache": r"cache",
    "the lock": r"/lock$",
    "the log": r"/log\.jsonl$",
    "a checkpoint": r"/\.?checkpoint\.safetensors",
    "a kept model": r"/\.?level_\d\d(\.tmp)?/model",
    "the level's files": r"/\.?level_\d\d",
    "the run's files": r"runs/[^/]+/.",
    "the run directory": r"runs",
}
SPARES = {  # what goes on being done where all that comes later is refused as well
    "ENOSPC": ("removal", "rename", "reading"),
    "EDQUOT": ("removal", "rename", "reading"),
    "EROFS": ("reading",),
}


@dataclass(frozen=True)
class Refusal:
    """Which call is refused, by its place ("write to a checkpoint", say) and number from 1; none with 0, and all are counted."""

    place: str = ""
    call: int = 0
    error: str = "ENOSPC"  # a name of `errno`
    lasting: bool = False  # all that comes after it is refused as well


def finished(folder: Path, plain_open: Callable[..., Any] = io.open) -> dict[str, str]:
    """The files of the run directories in a folder that are under no temporary name, and their sha256; not lock and log."""
    found = {}
    for path in sorted((folder / "runs").rglob("*")):
        where = path.relative_to(folder)
        if path.is_file() and path.name not in ("lock", "log.jsonl") and not any(part.startswith(".") for part in where.parts):
            with plain_open(path, "rb") as file:
                found[str(where)] = hashlib.sha256(file.read()).hexdigest()
    return found


@dataclass
class FileSystem:
    """The file system as a process sees it from `install` on."""

    refusal: Refusal
    calls: Counter[str] = field(default_factory=Counter)
    refused: dict[str, Any] | None = None  # the paths that were refused, and the finished files at the last of them

    def install(self) -> None:
        import safetensors.torch
        import transformers

        self.plain_open, self.here = io.open, os.getcwd()
        builtins.open = io.open = self.open  # type: ignore[assignment]
        for module, name, words in (
            (os, "fsync", "flush"),
            (os, "replace", "rename"),
            (os, "rename", "rename"),
            (os, "mkdir", "mkdir"),
            (os, "unlink", "removal"),
            (os, "rmdir", "removal"),
            (os, "chmod", "chmod"),
        ):
            setattr(module, name, self._refusing(getattr(module, name), words))
        serializing = "Error while serializing: I/O error: "
        self._replace(safetensors.torch, "serialize_file", "filename", lambda why: safetensors.SafetensorError(serializing + why))
        self._replace(transformers.PreTrainedTokenizerFast, "_save_pretrained", "save_directory", Exception)

    def refuses(self, operation: str, path: Any, folder: int | None = None) -> OSError | None:
        """Count a call; the error that it ends with, if it is to be refused."""
        where = self._where(path, folder)
        if where is None:
            return None
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, where))
        place = f"{operation} of {kind}"
        self.calls[place] += 1
        struck = (place, self.calls[place]) == (self.refusal.place, self.refusal.call)
        after = self.refused is not None and self.refusal.lasting
        if not struck and (not after or operation in SPARES.get(self.refusal.error, ())):
            return None
        paths = self.refused["paths"] if self.refused else []
        self.refused = {"paths": [*paths, where], "files": finished(Path(self.here))}
        number = getattr(errno, self.refusal.error)
        return OSError(number, os.strerror(number), where)

    def _where(self, path: Any, folder: int | None) -> str | None:
        """A path below the working directory, if it is one of the places."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        above = self.here if folder is None else os.readlink(f"/proc/self/fd/{folder}")
        where = os.path.relpath(os.path.join(above, os.fspath(path)), self.here)
        return where if where.split("/")[0] in PLACES else None

    def _refusing(self, function: Callable[..., Any], operation: str) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            target = arguments[0] if operation == "rename" else path
            if operation == "mkdir" and os.path.exists(path):  # that is what any file system says first
                return function(path, *arguments, **options)
            if error := self.refuses(operation, target, options.get("dir_fd")):
                raise error
            return function(path, *arguments, **options)

        return call

    def _replace(self, owner: Any, name: str, key: str, made: Callable[[str], Exception]) -> None:
        """Have a function that writes in Rust raise what `made` makes of the reason; `key` names its argument of the path."""
        import inspect

        function = getattr(owner, name)
        shape = inspect.signature(function)

        def call(*arguments: Any, **options: Any) -> Any:
            path = shape.bind(*arguments, **options).arguments[key]
            if error := self.refuses("write", path):
                raise made(f"{error.strerror} (os error {error.errno})")
            return function(*arguments, **options)

        setattr(owner, name, call)

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any) -> IO[Any]:
        if isinstance(file, int) or self._where(file, None) is None:
            return self.plain_open(file, mode, buffering, *text, **options)
        writes = bool(set(mode) & set("wax+"))
        if (writes or os.path.exists(file)) and (error := self.refuses("open" if writes else "reading", file)):
            raise error
        if not writes:
            return self.plain_open(file, mode, buffering, *text, **options)
        raw = Raw(self, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw  # type: ignore[return-value]
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, *text, **options)


class Raw(io.FileIO):
    """A file as the system sees it: what reaches it are whole buffers."""

    def __init__(self, system: FileSystem, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self.system, self.path = system, path

    def write(self, data: Any) -> int:
        if error := self.system.refuses("write", self.path):
            super().write(memoryview(data)[: len(data) // 2])
            raise error
        return super().write(data)

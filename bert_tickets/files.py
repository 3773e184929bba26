"""Atomic, checksummed files: written under a temporary name, flushed to disk, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bert_tickets.errors import Busy, Damaged, UserError

if TYPE_CHECKING:  # reading JSON and metadata needs no torch
    from torch import Tensor

FACTS = "bert_tickets"  # the only metadata key of our safetensors files (the order of several keys is random): a JSON object


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` when the block ends. After an error or a kill, `path` is unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a full disk has none
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Open a temporary folder that becomes `path` by one rename when the block ends. After an error, nothing is left of it."""
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            _sync(entry)
        temporary.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp"  # other processes may write the same


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Write a whole file atomically."""
    with writing(path) as file:
        file.write(content)


def check_utf8(path: str) -> None:
    """Raise `UserError` if the locale reads a path otherwise than as UTF-8, as the libraries in Rust and C++ do."""
    if os.fsencode(path) != path.encode("utf-8", "surrogatepass"):
        known = f"the encoding of this locale is {sys.getfilesystemencoding()}"
        raise UserError(f"{path!a} is not UTF-8 ({known}): export PYTHONUTF8=1 if the name is, or use names in ASCII")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def beginning_sha256(path: Path, size: int) -> str | None:
    """Return the sha256 of the first `size` bytes of a file; None if it has fewer, or is missing."""
    if not path.is_file() or path.stat().st_size < size:
        return None
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(min(size, 1 << 20)):
            sha.update(part)
            size -= len(part)
    return sha.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file. Raises `Busy`, naming the holder, if another process has it."""
    from filelock import FileLock, Timeout

    lock, holder = FileLock(path, timeout=0), path.with_name(f"{path.name}.holder")
    try:
        lock.acquire()
    except Timeout:
        name = ""
        with suppress(OSError):
            name = holder.read_text(encoding="utf-8", errors="replace").strip()  # empty while the holder writes it
        raise Busy(f"{path.parent} is in use by {name or 'another process'}; wait for it, or stop it") from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


# ---- JSON ----


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `Damaged` if it is not one."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not a JSON file: {error}") from None


def write_checksummed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum as a field."""
    text = json.dumps({**value, "checksum": _sha256_of_json(value)}, indent=1, sort_keys=True)
    write(path, text.encode() + b"\n")


def read_checksummed(path: Path) -> dict[str, Any]:
    """Read the object of `write_checksummed`. Raises `Damaged` if its checksum is missing or wrong."""
    value = read_json(path)
    if not isinstance(value, dict) or value.pop("checksum", None) != _sha256_of_json(value):
        raise Damaged(f"{path} is damaged or was edited: its content does not match its checksum")
    return value


def _sha256_of_json(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append a JSON line to a file. If the last line is torn, start a new one."""
    with path.open("ab+") as file:
        torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")


# ---- tensors ----


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and values."""
    import torch

    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():  # an empty tensor may have strides that `view` does not take
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
    """Write tensors and JSON facts about them as one safetensors file with a checksum. Equal content gives equal bytes."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"facts": dict(facts or {}), "sha256": sha256_of(plain)}
    text = json.dumps({**metadata, "checksum": _sha256_of_json(metadata)}, sort_keys=True)
    write(path, save(plain, {FACTS: text}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of `write_tensors` onto the CPU. Raises `Damaged` if they do not match their checksum."""
    from safetensors.torch import load_file

    expected = _read_metadata(path)["sha256"]
    tensors = load_file(path)
    if sha256_of(tensors) != expected:
        raise Damaged(f"{path} is damaged: its tensors do not match their checksum")
    return tensors


def has_facts(path: Path) -> bool:
    """Return whether a safetensors file was written by `write_tensors`. Raises `Damaged` if it is not a safetensors file."""
    return FACTS in _metadata(path)


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts of `write_tensors` without the tensors (and without torch). Raises `Damaged`."""
    return _read_metadata(path)["facts"]


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing" if not path.exists() else f"{path} is not a file")
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise Damaged(f"{path} is damaged or not a safetensors file: {error}") from None


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(_metadata(path).get(FACTS, "null"))
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict) or metadata.pop("checksum", None) != _sha256_of_json(metadata):
        raise Damaged(f"{path} is damaged, or was not written by bert_tickets: its metadata have no valid checksum")
    return metadata

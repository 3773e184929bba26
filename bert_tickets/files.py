"""Files that are whole or not there: written under a temporary name, flushed to the disk, renamed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bert_tickets import Busy, UserError
from bert_tickets.refusal import cannot_read, cannot_write, need_file

if TYPE_CHECKING:  # reading JSON and metadata takes no torch
    from torch import Tensor

CHECKSUM = "checksum"  # of a file's other content, by sha256
HEADER = 2**25  # bytes; a longer header of a safetensors file is no one's of ours, whose longest are a checkpoint's losses
OBJECT = 2**26  # bytes; a longer JSON object with a checksum likewise
DTYPES = {  # safetensors' names of what is written here
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.uint8": "U8",
}


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A file to fill, whose content appears at `path` when it is complete: a kill at any moment leaves the old one or the new
    one. An error raised while it is filled leaves the old one, and nothing beside it."""
    if not path.name or (os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)):
        raise UserError(f"cannot write {path}: it is no file's name, or a device's, which a file must not replace")
    temporary = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp"  # another process may write the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()  # what fills the disk
        if isinstance(error, OSError):
            raise cannot_write(path, error) from None
        raise


@contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which appears as `folder` when it is complete, by one rename: a kill at any moment leaves nothing there,
    and what it leaves beside it the next call removes. `folder` must not be there, or be empty."""
    folder = folder.absolute()
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        with take_lock(temporary / "lock"):  # another process may write the same
            try:
                for leftover in set(temporary.iterdir()) - {temporary / "lock"}:
                    leftover.unlink()
                yield temporary
                for file in temporary.iterdir():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
                (temporary / "lock").unlink()
                sync_folder(temporary)
                temporary.rename(folder)
                sync_folder(folder.parent)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)  # what fills the disk
                raise
    except OSError as error:
        with suppress(OSError):
            temporary.rmdir()  # if there was no lock to be had in it
        raise cannot_write(folder, error) from None


def write(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file of these parts, whole or not at all."""
    with writing(path) as file:
        for part in parts:
            file.write(part)


def write_json(path: Path, value: Any) -> None:
    write(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    """A JSON file's value; `UserError` where it is not one, `Refused` where it cannot be read now."""
    need_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise cannot_read(path, error) from None


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """A JSON object with a checksum of its own inside."""
    write_json(path, value | {CHECKSUM: _sha256(_compact(value))})


def read_sealed(path: Path, *, strict: bool = False) -> dict[str, Any]:
    """The object of `write_sealed`; `UserError` where it is damaged. One without a checksum, of an older version, is taken
    unless `strict`."""
    with suppress(OSError):
        if (size := path.stat().st_size) > OBJECT:
            raise UserError(f"{path} is damaged: of its {size:,} bytes at most {OBJECT:,} can be a run's")
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it is no JSON object")
    expected = value.pop(CHECKSUM, None)
    if expected is None:
        need_checksum(path, strict)
        return value
    try:
        found = _sha256(_compact(value))
    except RecursionError:
        raise UserError(f"{path} is damaged: it is nested too deep") from None
    if expected != found:
        raise UserError(f"{path} is damaged or was edited: its content does not match its checksum")
    return value


def need_checksum(path: Path, strict: bool) -> None:
    """Raise `UserError`, if `strict`, of a file without a checksum: a bit of the checksum's name may have flipped."""
    if strict:
        raise UserError(f"{path} is damaged or was edited: it has lost its checksum")


def _compact(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sha256(*parts: bytes | memoryview) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def file_sha256(path: Path) -> str:
    """The digest of a file that others write, and that has no checksum of its own; `OSError` where it cannot be read."""
    need_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(path: Path) -> IO[bytes]:
    """The opened lock file, held until it is closed; `Busy` where another process holds it, `OSError` where it cannot be.

    The file names its holder, where there is room. The kernel lets go of it however the process ends.
    """
    try:
        lock = path.open("ab+", buffering=0)  # what a full disk refuses is not tried again when the file is closed
    except FileNotFoundError:  # its folder was there just now
        raise Busy(_given_up(path)) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.1)  # who took it this moment has not written its name yet: another's may stand there
        lock.seek(0)
        holder = lock.read(200).decode(errors="replace").strip() or "another process"
        raise Busy(f"{path.parent} is in use by {holder}; wait for it, or stop it") from None
    except OSError as error:
        raise UserError(f"{path.parent} is on a file system without locks ({error.strerror}); give another place") from None
    try:
        removed = not os.path.samestat(path.stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        removed = True
    if removed:  # by its holder, meanwhile
        raise Busy(_given_up(path))
    with suppress(OSError):  # on a full disk it is held as well, by nobody's name; what is written next will say so
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock


def _given_up(lock: Path) -> str:
    return f"{lock.parent} was just given up by another process; give the command again"


def safetensors_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """The bytes of a safetensors file, in parts: equal content is equal bytes, and no copy of the tensors is made.

    Its metadata gain a checksum of all the rest, for `check`.
    The library's own writer orders the metadata by a hash map that differs from process to process, and builds the file
    in memory, three times the size of a checkpoint. The format is a header's length, the header and the tensors' bytes.
    """
    import torch

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    order = sorted(plain, key=lambda name: (-plain[name].element_size(), name))  # so that every tensor stays aligned
    header: dict[str, Any] = {"__metadata__": {key: value for key, value in metadata.items() if key != CHECKSUM}}
    end = 0
    for name in order:
        start, end = end, end + plain[name].nbytes
        header[name] = {"dtype": DTYPES[str(plain[name].dtype)], "shape": list(plain[name].shape), "data_offsets": [start, end]}
    parts = [plain[name].view(-1).view(torch.uint8).numpy().data for name in order if plain[name].numel()]
    header["__metadata__"][CHECKSUM] = _sha256(_compact(header), *parts)
    text = _compact(header)
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *parts]


def check(path: Path, *, strict: bool = False) -> None:
    """Raise `UserError` where a safetensors file's bytes do not match its checksum, `Refused` where they cannot be read now. One
    without a checksum is taken unless `strict`."""
    need_file(path)
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_header_size(file)))
            expected = header.get("__metadata__", {}).pop(CHECKSUM, None)
            if expected is None:
                need_checksum(path, strict)
                return
            sha = hashlib.sha256(_compact(header))
            while block := file.read(1 << 20):
                sha.update(block)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise cannot_read(path, error) from None
    if sha.hexdigest() != expected:
        raise UserError(f"{path} is damaged: its content does not match its checksum")


def _header_size(file: IO[bytes]) -> int:
    """The bytes of a safetensors file's header, read from its first eight; `ValueError` where they are no header's."""
    size = int.from_bytes(file.read(8), "little")
    if size > min(HEADER, os.fstat(file.fileno()).st_size):
        raise ValueError(f"its header is said to have {size} bytes")
    return size


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any] | None = None) -> None:
    """Tensors, and what JSON can say beside them, in one file."""
    write(path, *safetensors_parts(tensors, {"facts": json.dumps(facts or {})}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of `write_tensors`, on the CPU; `UserError` for a file that is damaged or missing."""
    check(path)
    with _opened(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of `write_tensors`, without reading the tensors; `UserError` likewise."""
    with _opened(path) as file:
        facts = json.loads((file.metadata() or {}).get("facts", "{}"))
    if not isinstance(facts, dict):
        raise UserError(f"{path} is damaged: its facts are no JSON object")
    return facts


def read_info(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself in its header, a mask's origin for one; its tensors are not read."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_dtypes(path: Path) -> dict[str, str]:
    """The type of each tensor of a safetensors file, in its own words (F32, BF16, I64, ...); the tensors are not read."""
    with _opened(path) as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no dictionary)


@contextmanager
def _opened(path: Path, framework: str = "numpy") -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    need_file(path)
    try:
        with path.open("rb") as plain:
            _header_size(plain)
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise cannot_read(path, error) from None

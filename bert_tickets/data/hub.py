"""Data sets of the hub: the one place that finds them in the hub's cache, downloads them, and says why it cannot.

Only parquet files are read, and no code is run. A revision in the cache is used without asking the hub: a data set stays the same
until the cache is deleted, and a machine without a network does not wait for one. Each file is downloaded when it is first read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

from bert_tickets.errors import UserError, cause
from bert_tickets.files import file_sha256
from bert_tickets.hub import is_of_disk, patiently


def no_data(problem: str, hub_name: str, folder: str) -> UserError:
    """Return the error for data that cannot be read, with the three ways to get them. `folder` describes the local files."""
    return UserError(
        f"{problem}\nThree ways to get the data:\n"
        f"  leave out --data-dir on a machine that reaches the hub: {hub_name} is downloaded and cached;\n"
        f"  run this command once on a machine that is online, and copy its HF_HOME to this machine's, {HF_HOME};\n"
        f"  give --data-dir {folder}."
    )


@dataclass(frozen=True)
class Dataset:
    """One revision of a data set on the hub."""

    name: str
    config: str
    revision: str
    files: Mapping[str, Sequence[str]]  # by split, in order
    layout: str  # of local files, for messages

    def columns(self, split: str, names: Sequence[str], rows: int = 1000) -> Iterator[list[list[Any]]]:
        """Yield the named columns of a split, some rows at a time. Raises `UserError`."""
        try:
            from pyarrow import parquet
        except Exception as error:  # not installed, or built for another version of NumPy
            problem = f"{self.name} is read by means of pyarrow, which cannot be imported: {cause(error)}"
            raise no_data(problem, self.name, self.layout) from None
        for file in self.files[split]:
            with _one_sentence(self.name, self.config, self.layout):
                path = self._fetch(file)
            try:
                with parquet.ParquetFile(path) as table:
                    for batch in table.iter_batches(rows, columns=names, use_threads=False):
                        yield [batch.column(name).to_pylist() for name in names]
            except Exception as error:
                raise _damaged(path, f"cannot be read as a parquet file with {', '.join(names)} ({cause(error)})") from None

    def _fetch(self, file: str) -> Path:
        """Return the path of a file in the hub's cache. Downloads it if it is not there; checks it against its sha256."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import enable_progress_bars

        path = _snapshots(self.name) / self.revision / file
        if not path.exists():
            print(f"downloading {self.name} {file}", flush=True)
            enable_progress_bars()  # transformers' are off
            path = Path(patiently(hf_hub_download, self.name, file, repo_type="dataset", revision=self.revision))
        content = path.resolve()
        if re.fullmatch("[0-9a-f]{64}", content.name) and file_sha256(content) != content.name:
            raise _damaged(path, "does not match the sha256 that names it")
        return path


def find_dataset(name: str, config: str, splits: Sequence[str], layout: str) -> Dataset:
    """Find the newest revision in the cache that has the first file of each split, else the hub's. Raises `UserError`."""
    with _one_sentence(name, config, layout):
        for folder in sorted(_snapshots(name).glob("*"), key=lambda path: path.stat().st_mtime, reverse=True):
            files = _files([f"{config}/{path.name}" for path in folder.glob(f"{config}/*") if path.exists()], config, splits)
            if all(files.values()):
                return Dataset(name, config, folder.name, files, layout)
        from huggingface_hub import HfApi

        about = patiently(HfApi().dataset_info, name)
        files = _files([file.rfilename for file in about.siblings], config, splits)
        if absent := [split for split in splits if not files[split]]:
            raise UserError(f"{name} on the hub has no files {config}/{absent[0]}-*.parquet: give --data-dir {layout}")
        return Dataset(name, config, about.sha, files, layout)


def _files(names: Sequence[str], config: str, splits: Sequence[str]) -> dict[str, list[str]]:
    """Name all files of each split by the number in its first one's name; none if that is not among `names`."""
    first = re.compile(rf"({re.escape(config)}/(\w+)-)00000-of-(\d{{5}})\.parquet")
    matches = {match[2]: match for match in map(first.fullmatch, names) if match}
    found = {split: matches[split] for split in splits if split in matches}
    listed = {split: [f"{m[1]}{i:05d}-of-{m[3]}.parquet" for i in range(int(m[3]))] for split, m in found.items()}
    return {split: listed.get(split, []) for split in splits}


def _snapshots(name: str) -> Path:
    return Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "snapshots"


def _damaged(path: Path, why: str) -> UserError:
    both = dict.fromkeys((str(path.resolve()), str(path)))  # the second is a link, if the system has links
    return UserError(f"{path} {why}: the download is damaged. Delete {' and '.join(both)}, and give the command again.")


@contextmanager
def _one_sentence(name: str, config: str, layout: str) -> Iterator[None]:
    """Convert any error of finding or downloading a data set to a `UserError` that blames the right one."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # offline, behind a proxy, without permission, on a full disk: many types
        if is_of_disk(error):
            raise UserError(
                f"cannot use the cache for {name}: {cause(error)}. Set HF_HOME, now {HF_HOME}, to another folder."
            ) from None
        raise no_data(f"cannot read {name} ({config}) from the hub: {cause(error)}", name, layout) from None

"""Data sets of the hub. Only parquet files are read, and no code is run; each file is downloaded when it is first read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bert_tickets.errors import UserError, cause
from bert_tickets.hub import Repository, damaged, with_retries


@dataclass(frozen=True)
class Dataset:
    """One revision of a data set on the hub."""

    source: Repository
    revision: str
    files: Mapping[str, Sequence[str]]  # by split, in order

    def columns(self, split: str, names: Sequence[str], rows: int = 1000) -> Iterator[list[list[Any]]]:
        """Yield the named columns of a split, some rows at a time. Raises `UserError`."""
        try:
            from pyarrow import parquet
        except Exception as error:  # not installed, or built for another version of NumPy
            problem = f"{self.source.name} is read by means of pyarrow, which cannot be imported: {cause(error)}"
            raise self.source.unavailable(problem) from None
        for file in self.files[split]:
            path = self.source.fetch(file, self.revision)
            if path is None:
                raise self.source.unavailable(f"{self.source.name} has no {file} in its revision {self.revision}")
            try:
                with parquet.ParquetFile(path) as table:
                    for batch in table.iter_batches(rows, columns=names, use_threads=False):
                        yield [batch.column(name).to_pylist() for name in names]
            except Exception as error:
                raise damaged(path, f"cannot be read as a parquet file with {', '.join(names)} ({cause(error)})") from None


def find_dataset(source: Repository, config: str, splits: Sequence[str]) -> Dataset:
    """Find the cache's revision that has the first file of each split: its `main`, else the newest; or else the hub's `main`."""
    try:
        main, folders = source.main(), source.cache.glob("snapshots/*")
        for folder in sorted(folders, key=lambda path: (path.name == main, path.stat().st_mtime), reverse=True):
            files = _files([f"{config}/{path.name}" for path in folder.glob(f"{config}/*") if path.exists()], config, splits)
            if all(files.values()):
                return Dataset(source, folder.name, files)
        from huggingface_hub import HfApi

        about = with_retries(HfApi().dataset_info, source.name)
    except Exception as error:  # offline, behind a proxy, without permission, on a full disk: many types
        raise source.error(f"{source.name} ({config})", error) from None
    files = _files([file.rfilename for file in about.siblings], config, splits)
    if absent := [split for split in splits if not files[split]]:
        raise UserError(f"{source.name} on the hub has no files {config}/{absent[0]}-*.parquet: give {source.instead}")
    return Dataset(source, about.sha, files)


def _files(names: Sequence[str], config: str, splits: Sequence[str]) -> dict[str, list[str]]:
    """Name all files of each split by the number in its first one's name; none if that is not among `names`."""
    first = re.compile(rf"{re.escape(config)}/(\w+)-00000-of-(\d{{5}})\.parquet")
    counts = {match[1]: match[2] for match in map(first.fullmatch, names) if match}
    shards = {split: [f"{i:05d}-of-{counts[split]}" for i in range(int(counts[split]))] for split in counts}
    return {split: [f"{config}/{split}-{shard}.parquet" for shard in shards.get(split, [])] for split in splits}

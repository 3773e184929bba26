"""Files of models and data sets of the hub: from its cache, else downloaded, and missing only if the hub itself says so.

A revision in the cache is used without asking the hub: it stays the same until the cache is deleted, and a machine without a
network does not wait for one. Each file is checked against the hash that names its content.
"""

from __future__ import annotations

import errno
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants

from bert_tickets.errors import UserError, cause, innermost
from bert_tickets.files import check_utf8

DISK = {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO}  # others are the network's too, which has no file names


@dataclass(frozen=True)
class Repository:
    """A model or a data set of the hub."""

    kind: Literal["model", "dataset"]
    name: str
    instead: str  # for messages: the flag and the local folder that it can be replaced by

    @property
    def cache(self) -> Path:
        """Its folder in the hub's cache."""
        return Path(constants.HF_HUB_CACHE) / f"{self.kind}s--{self.name.replace('/', '--')}"

    def main(self) -> str:
        """Return the revision that is `main` in the cache, or `main` if that is not known."""
        path = self.cache / "refs" / "main"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        return text if re.fullmatch("[0-9a-f]{40}", text) else "main"

    def fetch(self, file: str, revision: str | None = None, *, needed: bool = True) -> Path | None:
        """Return the path of a file in the cache; None if the repository does not have it. Raises `UserError`.

        Offline, a file that is not needed counts as missing if it is not in the cache.
        """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        from huggingface_hub.utils import enable_progress_bars

        check_utf8(str(self.cache))
        revision = revision or self.main()
        path = try_to_load_from_cache(self.name, file, repo_type=self.kind, revision=revision)
        if path is None:
            if (constants.HF_HUB_OFFLINE and not needed) or self._lacks(file, revision):
                return None
            if not constants.HF_HUB_OFFLINE and needed:
                print(f"downloading {file} of {self.name}", flush=True)
            if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
                enable_progress_bars()  # `load_bert` disables those of transformers
            try:
                path = with_retries(hf_hub_download, self.name, file, repo_type=self.kind, revision=revision)
            except Exception as error:
                if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                    return None
                raise self.error(f"{file} of {self.name}", error) from None
        if not isinstance(path, str):  # the cache's mark of a file that the hub said is missing
            return None
        self._check(Path(path))
        return Path(path)

    def _lacks(self, file: str, revision: str) -> bool:
        """Return whether a revision has no such file by the list of all files that `hf download` leaves in the cache."""
        try:
            from huggingface_hub import get_cached_repo_tree  # of huggingface_hub 2

            return file not in {entry.path for entry in get_cached_repo_tree(self.name, repo_type=self.kind, revision=revision)}
        except Exception:
            return False

    def _check(self, path: Path) -> None:
        """Check a file of the cache against the hash that names its content: a sha256, or git's sha1 of a small file."""
        content = path.resolve()
        if content == path or not re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", content.name):
            return
        names = {_digest(content, "sha256", b"")}
        if len(content.name) == 40:  # git's; some mirrors take the plain sha1
            names = {_digest(content, "sha1", b"blob %d\0" % content.stat().st_size), _digest(content, "sha1", b"")}
        if content.name not in names:
            raise damaged(path, "does not match the hash that names it")

    def error(self, what: str, error: Exception) -> UserError:
        """Return the error of a request to the hub: its true cause, and what to do."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        why, root = cause(error), innermost(error)
        in_cache = constants.HF_HUB_CACHE in str(getattr(root, "filename", None))
        if getattr(root, "errno", None) in DISK or in_cache or "(os error 28)" in str(root):  # in Rust: no space
            where = f"the hub's cache, {constants.HF_HUB_CACHE}"
            return UserError(f"cannot keep {what} in {where}: {why}. Set HF_HOME to a folder that can be written and has space")
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            why = f"there is no such {self.kind} on the hub, or it is private ({why})"
        elif constants.HF_HUB_OFFLINE:
            why = "it is not in the cache, and HF_HUB_OFFLINE is set"
        here = f"there is no folder {self.name}; " if self.kind == "model" else ""
        return self.unavailable(f"{here}cannot read {what} from the hub: {why}")

    def unavailable(self, problem: str) -> UserError:
        """Return an error with the three ways to get the files."""
        online = "set HF_HUB_OFFLINE=1 to use the cache as it is" if self.kind == "model" else "leave out --data-dir"
        return UserError(
            f"{problem}\nThree ways to get {self.name}:\n"
            f"  from the hub, on a machine that reaches it, where it is downloaded and cached ({online});\n"
            f"  run this command once on a machine that is online, and copy its HF_HOME to this machine's, {constants.HF_HOME};\n"
            f"  give {self.instead}."
        )


def damaged(path: Path, why: str) -> UserError:
    """Return the error for a damaged file of the cache."""
    both = dict.fromkeys((str(path.resolve()), str(path)))  # the second is a link, if the system has links
    return UserError(f"{path} {why}: the download is damaged. Delete {' and '.join(both)}, and give the command again.")


def with_retries(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function of the hub's client, again after 1, 2 and 4 seconds if the hub answers that it is overloaded (5xx)."""
    for wait in (1, 2, 4):
        try:
            return call(*arguments, **options)
        except Exception as error:
            response = getattr(innermost(error), "response", None)
            if response is None or response.status_code < 500:
                raise
        time.sleep(wait)
    return call(*arguments, **options)


def _digest(path: Path, algorithm: str, prefix: bytes) -> str:
    sha = hashlib.new(algorithm, prefix)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: sha).hexdigest()

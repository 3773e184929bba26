"""A small hub on 127.0.0.1, of generated data: enough for `huggingface_hub` to list and to download the files of repositories."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from bert_tickets.data import glue_files, squad_files

REVISION = "0123456789abcdef0123456789abcdef01234567"
CONFIG, ROWS = "wikitext-103-raw-v1", 40


def write_shards(folder: Path, split: str, columns: dict, shards: int = 1) -> None:
    """Write columns as the parquet files of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    size = -(-len(table) // shards)
    for i in range(shards):
        parquet.write_table(table.slice(i * size, size), folder / f"{split}-{i:05d}-of-{shards:05d}.parquet")


def write_glue(folder: Path, glue_dir: Path, tasks: list[str]) -> None:
    """Write GLUE's files as a repository of the hub."""
    for task in tasks:
        row = glue_files.ROWS[task]
        for split, examples in glue_files.read_folder(glue_dir, row).items():
            texts, labels = zip(*examples, strict=True)
            columns = dict(zip(row.hub_texts or row.texts, map(list, zip(*texts, strict=True)), strict=True))
            write_shards(folder / task, split, columns | {"label": list(labels), "idx": list(range(len(labels)))})


def write_squad(folder: Path, squad_dir: Path) -> None:
    """Write SQuAD's files as a repository of the hub."""
    for split, questions in squad_files.read_folder(squad_dir).items():
        columns = {name: [getattr(q, name) for q in questions] for name in ("id", "question", "context")}
        golds = [{"text": [text for text, _ in q.answers], "answer_start": [at for _, at in q.answers]} for q in questions]
        write_shards(folder / "plain_text", split, columns | {"title": ["A"] * len(questions), "answers": golds})


def write_wikitext(folder: Path, corpus_dir: Path) -> None:
    """Write `en.train` and `en.valid` as a repository of the hub, the first as two files."""
    for split, file in (("train", "en.train"), ("validation", "en.valid")):
        lines = (corpus_dir / file).read_text(encoding="utf-8").splitlines(keepends=True)
        write_shards(folder / CONFIG, split, {"text": lines}, 2 if split == "train" else 1)


def write_hub(root: Path, bert_dir: Path, glue_dir: Path, squad_dir: Path, corpus_dir: Path) -> None:
    """Write the repositories that the three scripts read by default, and WNLI and MNLI."""
    shutil.copytree(bert_dir, root / "bert-base-uncased")
    write_glue(root / "datasets" / "nyu-mll/glue", glue_dir, ["rte", "mnli", "wnli"])
    write_squad(root / "datasets" / "rajpurkar/squad", squad_dir)
    write_wikitext(root / "datasets" / "Salesforce/wikitext", corpus_dir)


class SmallHub(ThreadingHTTPServer):
    """Serves the repositories `root/NAME` and `root/datasets/NAME`. `requests` lists the paths of all requests.

    `faults` maps a part of a path to the status and message of the answer, or to None for a file that is damaged on the way.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.requests: list[str] = []
        self.faults: dict[str, tuple[int, str] | None] = {}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SmallHub

    def do_GET(self) -> None:
        hub = self.server
        hub.requests.append(self.path)
        fault = next((answer for part, answer in hub.faults.items() if part in self.path), "")
        if fault:
            self.send(fault[0], b"{}", **{"X-Error-Message": fault[1]})
        elif match := re.fullmatch(r"/api/(?:models/)?([^?]+?)(/revision/\w+|/tree/\w+)?(\?.*)?", self.path):
            self.describe(hub.root / match[1], is_tree="/tree/" in (match[2] or ""))
        elif (match := re.fullmatch(r"/(.+)/resolve/\w+/(.+)", self.path)) and (path := hub.root / match[1] / match[2]).is_file():
            content = path.read_bytes()
            headers = {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            if fault is None:
                content = content[:100] + b"damage" + content[106:]
            self.send(200, content, **headers)
        else:
            self.send(404, b"{}", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": REVISION})

    do_HEAD = do_GET

    def describe(self, folder: Path, is_tree: bool) -> None:
        files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
        tree = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in files.items()]
        about = {"id": folder.name, "sha": REVISION, "siblings": [{"rfilename": name} for name in files]}
        self.send(200 if files else 404, json.dumps(tree if is_tree else about).encode())

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass

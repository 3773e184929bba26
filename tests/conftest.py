"""Everything the tests need is made here: a small BERT, its vocabulary, GLUE folders. No test reaches the network."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup, or behind `&`: tests of signals would wait forever
        signal.signal(number, action)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as prepare_device does; the first product decides
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="bert_tickets-tests-")  # its caches, and ours beside them
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before its kernels are imported

from crash_harness import Harness
from fake_cuda import FAKE, REAL
from paragraphs import content
from sentences import BAD, GOOD, OTHERS, write_glue
from trainrun import THREE_LEVELS, Runs, script_of, train
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

from bert_tickets.bench.tiny_bert import LETTERS, SPECIAL, save_tokenizer
from bert_tickets.data.batches import TokenStore
from bert_tickets.data.token_cache import Tokens
from bert_tickets.modeling.loading import load_bert

pytest_plugins = ["pairs", "tickets"]  # further fixtures

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data-dir", help="real data (SQuAD's published files), for the tests marked realdata")
    parser.addoption("--cluster", action="store_true", help="run the tests marked cluster as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    needed = {
        "realdata": (config.getoption("--data-dir"), "needs --data-dir with real data"),
        "cluster": (config.getoption("--cluster"), "needs --cluster: minutes"),
        "faults": ("faults" in config.getoption("-m"), "needs -m faults: minutes"),
        "cuda": (torch.cuda.is_available(), "needs a CUDA GPU"),
    }
    for item in items:
        for name, (given, reason) in needed.items():
            if item.get_closest_marker(name) and not given:  # `item.keywords` holds parts of a parameter's id as well
                item.add_marker(pytest.mark.skip(reason=reason))


FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> list[str]:
    """Lines that stand at the end of what pytest prints."""
    return request.config.stash.setdefault(FIGURES, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in terminalreporter.config.stash.get(FIGURES, []):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail whatever opens a connection."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX:
            raise AssertionError(f"a test opened a connection to {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def restore_torch() -> object:
    """What a run sets for the whole process (determinism) does not leak from test to test."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run: on a real GPU, or without one on the CPU, by Triton's interpreter."""
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture(params=[FAKE, REAL])
def one_gpu(request: pytest.FixtureRequest):
    """A context in which torch sees a GPU: a fake one, or with `-m cuda` a real one."""
    return request.param


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 layers, hidden 32, with a word-level vocabulary and its tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("bert")
    letters = LETTERS + list("0123456789é'\".,“”#")
    words = SPECIAL + letters + ["##" + letter for letter in letters] + GOOD + BAD + OTHERS + ["not"]
    config = BertConfig(
        vocab_size=save_tokenizer(words, folder),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    net = BertModel(config)
    generator = torch.Generator().manual_seed(0)  # not the library's own initialisation, which may change with its version
    with torch.no_grad():
        for name, p in sorted(net.named_parameters()):
            p.normal_(1.0 if "LayerNorm.weight" in name else 0.0, 0.1, generator=generator)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(bert_dir: Path) -> BertTokenizer:
    """The small BERT's tokenizer, which no test may change."""
    return AutoTokenizer.from_pretrained(bert_dir)


@pytest.fixture
def net(bert_dir: Path) -> torch.nn.Module:
    """The small BERT with a classifier of two classes."""
    return load_bert(str(bert_dir), "classifier", "pretrained", 0)[0]


@pytest.fixture(scope="session")
def calm_bert_dir(bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same BERT with dropout 0: what it computes depends on no random number."""
    folder = tmp_path_factory.mktemp("calm") / "bert"
    shutil.copytree(bert_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def model(bert_dir: Path, tmp_path: Path) -> Path:
    """A copy of the small BERT."""
    return Path(shutil.copytree(bert_dir, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of tokens."""
    monkeypatch.setattr("bert_tickets.data.token_cache.HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "bert_tickets"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def store_of(lengths: list[int], labels: np.ndarray | None = None) -> TokenStore:
    """A store of random tokens, each example of two texts; of two classes, unless labels are given."""
    rng = np.random.default_rng(len(lengths))
    ids = [rng.integers(5, 100, n).tolist() for n in lengths]
    types = [[0] * (n // 2) + [1] * (n - n // 2) for n in lengths]
    return TokenStore(Tokens.of(ids, types), rng.integers(0, 2, len(lengths)) if labels is None else labels)


@pytest.fixture(scope="session")
def glue_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All nine tasks in the original layout: 44 training and 20 evaluation lines each, one of them far too long."""
    root = tmp_path_factory.mktemp("glue")
    write_glue(root)
    return root


@pytest.fixture(scope="session")
def squad_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both of SQuAD's files: 30 training questions, 20 for evaluation."""
    folder = tmp_path_factory.mktemp("squad")
    for file, count in (("train-v1.1.json", 30), ("dev-v1.1.json", 20)):
        text = json.dumps(content(file, count), ensure_ascii=file.startswith("dev"))
        (folder / file).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain text: `en.train` of 3,000 words and `en.valid` of 800."""
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    for file, count in (("en.train", 3000), ("en.valid", 800)):
        (folder / file).write_text("".join(word + rng.choice("   \n") for word in rng.choices(OTHERS, k=count)))
    return folder


@pytest.fixture(scope="session")
def documents_dir(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of `corpus_dir` in longer lines, and in documents that are long enough for pairs of segments."""
    folder = tmp_path_factory.mktemp("documents")
    for path in corpus_dir.iterdir():
        lines = path.read_text().split("\n")
        joined = [" ".join(lines[at : at + 4]) for at in range(0, len(lines), 4)]
        (folder / path.name).write_text("\n".join(f"{line}\n" * (at % 3 == 2) + line for at, line in enumerate(joined)))
    return folder


@pytest.fixture(scope="session")
def commands(bert_dir: Path, glue_dir: Path, squad_dir: Path, corpus_dir: Path) -> dict[str, list[str]]:
    """Small settings for each training script: some dozen steps of a level, no levels said."""
    words = {
        "lt_glue.py": f"--task rte --data-dir {glue_dir} --batch-size 16 --max-steps 6",
        "lt_squad.py": f"--data-dir {squad_dir} --max-length 100 --doc-stride 32 --batch-size 16 --max-steps 8",
        "lt_pretrain.py": f"--data-dir {corpus_dir} --max-length 16 --batch-size 8 --max-steps 6 --limit-eval 9",
    }
    return {script: f"{line} --model {bert_dir} --lr 1e-3 --log-every 2".split() for script, line in words.items()}


@pytest.fixture
def of_documents(commands: dict[str, list[str]], documents_dir: Path) -> list[str]:
    """lt_pretrain.py's without --max-steps and --lr, on a text whose documents are long enough for pairs."""
    given = [*commands["lt_pretrain.py"]]
    given[given.index("--data-dir") + 1] = str(documents_dir)
    return given[: given.index("--max-steps")] + given[given.index("--limit-eval") : given.index("--lr")] + ["--log-every", "2"]


@pytest.fixture
def script() -> str:
    """The training script that `runs` runs; tests parametrize it."""
    return "lt_glue.py"


@pytest.fixture
def runs(script: str, commands: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Runs of the script in this process: three levels of six steps or eight, a checkpoint every two."""
    return Runs(script, [*commands[script], *THREE_LEVELS], tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def train_task(commands: dict[str, list[str]]) -> Callable[..., Path]:
    """Train a task with small settings and more words, in a folder; returns the run directory."""

    def go(task: str, folder: Path, *words: object) -> Path:
        script = script_of(task)
        own = ["--task", task] if script == "lt_glue.py" else []
        return train(script, [*commands[script], *own, "--output-dir", folder, *words])

    return go


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """A process that forks runs of the training scripts. In the folder `harness.added` methods and presets may be added."""
    added = tmp_path_factory.mktemp("added")
    for folder in ("methods", "presets"):
        (added / "bert_tickets" / folder).mkdir(parents=True)
    harness = Harness(added)
    yield harness
    harness.close()

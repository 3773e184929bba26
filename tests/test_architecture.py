"""Modules import only from their own folder and from lower layers, and heavy packages only where they belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import bert_tickets

PACKAGE = Path(bert_tickets.__file__).parent
LAYERS = [  # from the bottom; "" are the modules at the package's top level. A new module gets its folder's layer.
    {""},
    {"masking", "kernels"},
    {"modeling"},
    {"data"},
    {"tasks", "training"},
    {"runs"},
    {"methods"},
    {"export", "report", "sweep", "bench"},
]
# Needed by --help, a mistyped flag, --dry-run, a finished run and a finished sweep: importing these must not import torch.
NO_TORCH = ["cli", "config", "content", "errors", "files", "methods.early_bird", "methods.imp", "methods.main"]
NO_TORCH += ["methods.transfer", "report.tables", "runs.directory", "runs.integrity", "runs.naming", "runs.summary"]
NO_TORCH += ["sweep.jobs", "sweep.runner"]
ONLY_IN = {"transformers": {"modeling.loading", "modeling.tokenizer", "modeling.weights", "export.trainer", "bench.tiny_bert"}}
NEVER_AT_IMPORT = {"datasets", "evaluate", "pyarrow", "pandas", "matplotlib", "ray", "onnx", "onnxruntime", "onnxscript"}
MAX_LINES = {"file": 300, "function": 60}


def imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The dotted names that these nodes import, such as `bert_tickets.masking.mask.Mask`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import, which this test does not follow"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(package: Path) -> list[str]:
    """Every violation of the architecture, one line each."""
    folders = {path.name for path in package.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    level = {folder: number for number, layer in enumerate(LAYERS) for folder in layer}
    lines = [f"the folder {folder} has no layer" for folder in folders - level.keys()]
    for path in package.rglob("*.py"):
        name, tree = ".".join(path.relative_to(package).with_suffix("").parts), ast.parse(path.read_text(encoding="utf-8"))
        here = folder_of(name, folders)
        for target in imports(ast.walk(tree)):
            outer, _, inner = target.partition(".")
            there = folder_of(inner, folders)
            if outer == "bert_tickets" and here != there and level.get(there, 0) >= level.get(here, 0):
                lines.append(f"{name} imports {inner}")
            if name not in ONLY_IN.get(outer, {name}):
                lines.append(f"{name} imports {outer}")
        early = {target.partition(".")[0] for target in imports(tree.body)}
        lines += [f"{name} imports {other} at import" for other in early & NEVER_AT_IMPORT]
    return lines


def folder_of(name: str, folders: set[str]) -> str:
    top = name.partition(".")[0]
    return top if top in folders else ""


def test_the_package_keeps_to_its_layers():
    assert faults(PACKAGE) == []


def test_commands_that_train_nothing_do_not_import_torch():
    names = ", ".join(f"bert_tickets.{name}" for name in NO_TORCH)
    heavy = {"torch", "transformers", *NEVER_AT_IMPORT}
    subprocess.run(
        [sys.executable, "-c", f"import sys, {names}; assert not {heavy} & sys.modules.keys()"], cwd=PACKAGE.parent, check=True
    )


def test_violations_are_found(tmp_path):
    sources = {
        "masking/new": "from bert_tickets.modeling.bert import encode\nfrom bert_tickets.files import write",
        "files": "def late():\n    import bert_tickets.modeling.bert",
        "tasks/new": "import bert_tickets.training.step\ndef late():\n    import evaluate",
        "training/step": "if TYPE_CHECKING:\n    from datasets import Dataset",
        "stray/new": "import json",
        "modeling/bert": "def late():\n    import transformers",
        "data/new": "from datasets import load_dataset",
    }
    for name, text in sources.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert sorted(faults(tmp_path)) == [
        "data.new imports datasets at import",
        "files imports modeling.bert",
        "masking.new imports modeling.bert.encode",
        "modeling.bert imports transformers",
        "tasks.new imports training.step",
        "the folder stray has no layer",
    ]


def sources() -> list[Path]:
    """The files of the package and of the scripts."""
    return [*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("*.py"), *(PACKAGE.parent / "scripts").glob("*.py")]


def opened_by_locale(text: str) -> list[str]:
    """The calls of a source that open a text file, or decode a program's output, without an encoding."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and not any(word.arg == "encoding" for word in node.keywords):
            name, call = ast.unparse(node.func).rpartition(".")[2], ast.unparse(node)
            modes = [arg.value for arg in (*node.args, *(word.value for word in node.keywords)) if isinstance(arg, ast.Constant)]
            binary = any(isinstance(mode, str) and re.fullmatch("[rwaxbt+]*b[rwaxbt+]*", mode) for mode in modes)
            if name in ("read_text", "write_text") or (name in ("open", "fdopen") and not binary and "os.open" not in call):
                found.append(call)
            if name in ("run", "Popen", "check_output") and any(word.arg == "text" for word in node.keywords):
                found.append(call)
    return found


def test_files_are_utf8_in_every_locale():
    assert [call for path in sources() for call in opened_by_locale(path.read_text(encoding="utf-8"))] == []
    bad = ["open(p)", "p.open('a')", "p.read_text()", "p.write_text(t)", "open(p, mode='w')", "run(c, text=True)"]
    good = ["open(p, 'rb')", "p.open('ab+')", "open(p, encoding='utf-8')", "p.read_bytes()", "os.open(p, f)", "run(c)"]
    assert opened_by_locale("\n".join([*bad, *good])) == [ast.unparse(ast.parse(call)) for call in bad]


def test_files_and_functions_are_short():
    long = []
    for path in sources():
        text = path.read_text(encoding="utf-8")
        long += [path.name] * (len(text.splitlines()) > MAX_LINES["file"])
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_LINES["function"]:
                long.append(f"{path.name}: {node.name}")
    assert long == []

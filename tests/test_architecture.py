"""Modules import only from their own folder and from lower layers, and heavy packages only where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import bert_tickets

PACKAGE = Path(bert_tickets.__file__).parent
LAYERS = [  # from the bottom; "" are the modules at the package's top level. A new module gets its folder's layer.
    {""},
    {"masking"},
    {"modeling"},
    {"data"},
    {"tasks", "training"},
    {"runs"},
    {"methods"},
    {"export", "report", "sweep", "bench"},
]
# Needed by --help, a mistyped flag, --dry-run, a finished run and a finished sweep: importing these must not import torch.
NO_TORCH = ["cli", "config", "errors", "files", "methods.imp", "methods.main", "methods.transfer", "report.results"]
NO_TORCH += ["runs.directory", "runs.integrity", "runs.summary", "sweep.jobs", "sweep.runner"]
ONLY_IN = {"transformers": {"modeling.loading", "bench.tiny_bert"}}
NEVER_AT_IMPORT = {"datasets", "evaluate", "pandas", "matplotlib", "ray"}
MAX_LINES = {"file": 300, "function": 60}


def modules(package: Path) -> dict[str, ast.Module]:
    """Every module of a package by its dotted name ("" is its root)."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: not the bodies of functions, nor what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not for_types and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import(child)


def imports(name: str, nodes: Iterator[ast.AST], own: set[str]) -> Iterator[str]:
    """The imports of module `name`: `.masking.mask` for a module of the package, `torch` for another package."""
    for node in nodes:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively, which this test does not follow"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            outer, _, inner = target.partition(".")
            if outer != "bert_tickets":
                yield outer
                continue
            while inner and inner not in own:  # a name within a module
                inner = inner.rpartition(".")[0]
            yield f".{inner}"


def folder_of(name: str, folders: set[str]) -> str:
    top = name.partition(".")[0]
    return top if top in folders else ""


def allowed(importer: str, imported: str) -> bool:
    """Whether a folder may import from another one."""
    level = {folder: number for number, layer in enumerate(LAYERS) for folder in layer}
    return importer == imported or level[imported] < level[importer]


def faults(package: Path) -> list[str]:
    """Every violation of the architecture, one line each."""
    found = modules(package)
    own = set(found)
    folders = {path.name for path in package.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    everywhere = {name: set(imports(name, ast.walk(tree), own)) for name, tree in found.items()}
    early = {name: set(imports(name, at_import(tree), own)) for name, tree in found.items()}
    lines = [f"the folder {folder} has no layer" for folder in folders - set().union(*LAYERS)]
    if lines:
        return lines
    for name, targets in everywhere.items():
        inner = {target[1:] for target in targets if target.startswith(".")} - {""}
        here = folder_of(name, folders)
        lines += [f"{name} imports {other}" for other in inner if not allowed(here, folder_of(other, folders))]
        for library, places in ONLY_IN.items():
            lines += [f"{name} imports {library}"] * (library in targets and name not in places)
    for name, targets in early.items():
        lines += [f"{name} imports {other} at import" for other in targets & NEVER_AT_IMPORT]
    lines += [f"{name} imports torch" for name in NO_TORCH if name in own and "torch" in reached(name, early)]
    lines += [f"{name} imports itself in a circle" for name in own if f".{name}" in reached(name, everywhere)]
    return lines


def reached(name: str, graph: dict[str, set[str]]) -> set[str]:
    """All that a module imports, directly or not. Importing `.tasks.glue` also imports `.tasks`."""
    seen: set[str] = set()
    ahead = [name]
    while ahead:
        at = ahead.pop()
        parents = {"." + at.rpartition(".")[0]} if "." in at else set()
        for target in (graph.get(at, set()) | parents) - seen - {"."}:
            seen.add(target)
            if target.startswith("."):
                ahead.append(target[1:])
    return seen


def test_the_package_keeps_to_its_layers():
    assert faults(PACKAGE) == []


def test_the_package_root_imports_none_of_its_modules():
    assert not any(target.startswith(".") for target in imports("", ast.walk(modules(PACKAGE)[""]), set(modules(PACKAGE))))


def test_every_module_that_must_not_import_torch_exists():
    assert set(NO_TORCH) <= modules(PACKAGE).keys()


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ({"masking/new": "from bert_tickets.modeling.bert import encode"}, "masking.new imports modeling.bert"),
        ({"files": "import bert_tickets.modeling.bert"}, "files imports modeling.bert"),
        ({"files": "from bert_tickets.modeling import bert"}, "files imports modeling.bert"),
        ({"files": "def late():\n    from bert_tickets.modeling.bert import encode"}, "files imports modeling.bert"),
        ({"tasks/new": "import bert_tickets.training.step", "training/step": ""}, "tasks.new imports training.step"),
        ({"stray/new": "import json"}, "the folder stray has no layer"),
        ({"config": "import bert_tickets.files", "files": "import bert_tickets.config"}, "in a circle"),
        ({"modeling/bert": "import transformers"}, "modeling.bert imports transformers"),
        ({"modeling/bert": "def late():\n    import transformers"}, "modeling.bert imports transformers"),
        ({"modeling/bert": "try:\n    import evaluate\nfinally:\n    pass"}, "modeling.bert imports evaluate at import"),
        ({"tasks/__init__": "class Task:\n    from datasets import load_dataset"}, "tasks imports datasets at import"),
        ({"config": "import torch.nn"}, "config imports torch"),
        ({"cli": "from bert_tickets.files import write", "files": "import torch"}, "cli imports torch"),
    ],
)
def test_a_violation_is_found(tmp_path, sources, fault):
    assert any(fault in line for line in faults(package(tmp_path, sources)))


@pytest.mark.parametrize(
    "source",
    [
        "from bert_tickets.files import write",
        "from bert_tickets.masking.other import x",
        "def late():\n    import evaluate",
        "if TYPE_CHECKING:\n    from datasets import Dataset",
    ],
)
def test_a_new_module_has_its_folders_layer(tmp_path, source):
    assert faults(package(tmp_path, {"masking/new": source, "masking/other": "x = 1"})) == []


def package(folder: Path, sources: dict[str, str]) -> Path:
    for name, text in {"__init__": "", "files": "", "masking/__init__": "", "modeling/bert": "", **sources}.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_files_and_functions_are_short():
    long = []
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("*.py"), *(PACKAGE.parent / "scripts").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        long += [f"{path.name}: {len(text.splitlines())}"] * (len(text.splitlines()) > MAX_LINES["file"])
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_LINES["function"]:
                long.append(f"{path.name}: {node.name} {node.end_lineno - node.lineno + 1}")
    assert long == []

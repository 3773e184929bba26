"""The house of the package: a module imports only from its floor or a lower one, heavy packages only where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import bert_tickets

PACKAGE = Path(bert_tickets.__file__).parent
FLOORS = {
    "config": 0,
    "schedule": 0,
    "files": 0,
    "tokens": 0,
    "environment": 0,
    "metrics": 0,
    "mask": 0,
    "prune": 0,
    "command": 0,
    "demo": 0,
    "figures": 0,
    "figures.pictures": 0,
    "figures.heatmap": 0,
    "figures.curves": 0,
    "figures.series": 3,
    "tables.published": 0,
    "tables.verdicts": 0,
    "attention": 1,
    "bert": 1,
    "dropout": 1,
    "batches": 1,
    "device": 0,
    "checkpoints": 0,
    "warnings": 0,
    "models": 1,
    "tasks": 1,
    "tasks.glue": 1,
    "tasks.mlm": 1,
    "tasks.squad": 1,
    "hub": 0,
    "texts": 0,
    "windows": 0,
    "corpus": 1,
    "graphs": 2,
    "step": 2,
    "train": 2,
    "runs": 2,
    "lottery": 3,
    "report": 3,
    "perturb": 3,
    "compare": 3,
    "records": 3,
    "group": 0,
    "refusal": 0,
    "history": 0,
    "soundness": 0,
    "recovery": 0,
    "levels": 2,
    "tables.sweeps": 3,
    "tables.entries": 3,
    "tables.layout": 3,
    "tables": 3,
    "tables.notes": 3,
    "tables.winning": 3,
    "tables.variations": 3,
    "tables.transfers": 3,
    "ticket": 3,
    "card": 3,
    "export": 3,
    "inspect": 3,
    "sweep": 3,
    "sweep.jobs": 3,
    "sweep.schedule": 3,
    "sweep.view": 3,
}
# What --help, a mistyped flag, --dry-run, a finished run and a finished sweep need: no torch.
AT_ONCE = {"config", "schedule", "metrics", "command", "report", "history", "sweep.jobs", "sweep.schedule", "sweep.view"}
AT_ONCE |= {"compare", "records", "export", "inspect"}
TRANSFORMERS = {"models"}
NEVER_AT_ONCE = {"datasets", "evaluate"}


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
    """What the nodes of module `name` import: `.mask` for a module of the package, `torch` for another package."""
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


def faults(package: Path, floors: dict[str, int]) -> list[str]:
    """What breaks the rules of the house, a line each."""
    found = modules(package)
    own = set(found)
    everywhere = {name: set(imports(name, ast.walk(tree), own)) for name, tree in found.items()}
    at_once = {name: set(imports(name, at_import(tree), own)) for name, tree in found.items()}
    lines = [f"{name} has no floor" for name in own - {""} - set(floors)]
    for name, targets in everywhere.items():
        inner = {target[1:] for target in targets if target.startswith(".")} - {""}
        lines += [f"{name} climbs to {other}" for other in inner if floors.get(other, 0) > floors.get(name, -1)]
        if "transformers" in targets and name not in TRANSFORMERS:
            lines.append(f"{name} imports transformers")
    for name, targets in at_once.items():
        lines += [f"{name} imports {other} when it is imported" for other in targets & NEVER_AT_ONCE]
    for name in AT_ONCE & own:
        if "torch" in reached(name, at_once):
            lines.append(f"{name} imports torch")
    lines += [f"{name} imports itself in a circle" for name in own if f".{name}" in reached(name, everywhere)]
    return lines


def reached(name: str, graph: dict[str, set[str]]) -> set[str]:
    """All that a module imports, by way of others too. Importing `.tasks.glue` also imports `.tasks`."""
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


def test_the_package_keeps_to_its_floors():
    assert faults(PACKAGE, FLOORS) == []


def test_the_root_imports_none_of_its_modules():
    assert list(imports("", ast.walk(modules(PACKAGE)[""]), set(FLOORS))) == []


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ({"files": "from bert_tickets.modeling.loading import load"}, "files climbs to models"),
        ({"files": "import bert_tickets.modeling.loading"}, "files climbs to models"),
        ({"files": "from bert_tickets import models"}, "files climbs to models"),
        ({"files": "def late():\n    from bert_tickets.modeling.loading import load"}, "files climbs to models"),
        ({"stray": "import json"}, "stray has no floor"),
        ({"mask": "from bert_tickets.files import write", "files": "from bert_tickets.masking.mask import Mask"}, "in a circle"),
        ({"step": "import transformers"}, "step imports transformers"),
        ({"step": "def late():\n    import transformers"}, "step imports transformers"),
        ({"metrics": "import evaluate"}, "metrics imports evaluate when"),
        ({"metrics": "try:\n    import evaluate\nexcept ImportError:\n    pass"}, "metrics imports evaluate when"),
        ({"tasks": "class Task:\n    from datasets import load_dataset"}, "tasks imports datasets when"),
        ({"config": "import torch.nn"}, "config imports torch"),
        ({"command": "from bert_tickets.files import write", "files": "import torch"}, "command imports torch"),
    ],
)
def test_a_house_that_breaks_a_rule_is_found(tmp_path, sources, fault):
    for name in ("__init__", "models", "files"):
        (tmp_path / f"{name}.py").write_text("UserError = None\n")
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    assert any(fault in line for line in faults(tmp_path, FLOORS))


@pytest.mark.parametrize(
    "source",
    [
        "from bert_tickets import UserError",
        "from bert_tickets.files import write",
        "def late():\n    import evaluate",
        "if TYPE_CHECKING:\n    from datasets import Dataset",
    ],
)
def test_a_house_that_keeps_the_rules_is_left_in_peace(tmp_path, source):
    for name, text in (("__init__", "UserError = None"), ("files", "import torch"), ("mask", source)):
        (tmp_path / f"{name}.py").write_text(text)
    assert faults(tmp_path, FLOORS) == []


def test_no_file_is_over_300_lines():
    sizes = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path: lines for path, lines in sizes.items() if lines > 300} == {}

"""The data of SQuAD v1.1: questions, read from the published files or from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_tickets.data.hub import from_hub, missing_data
from bert_tickets.errors import UserError
from bert_tickets.files import read_json as read_json_file

HUB = "rajpurkar/squad"
FILES = {"train": "train-v1.1.json", "validation": "dev-v1.1.json"}


@dataclass(frozen=True)
class Question:
    """A question about a context, and its gold answers: text and index of the first character in the context."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]

    @property
    def found_answer(self) -> tuple[str, int] | None:
        """The first answer whose text is in the context at its index."""
        for text, start in self.answers:
            if start >= 0 and text.strip() and self.context.startswith(text, start):
                return text, start
        return None


def read_folder(data_dir: Path) -> dict[str, list[Question]]:
    """Read both published files of a folder. Raises `UserError` if one is missing."""
    for file in FILES.values():
        if not (data_dir / file).is_file():
            layout = f"a folder with the published files {' and '.join(FILES.values())}"
            message = f"no SQuAD data: {data_dir / file} does not exist"
            raise missing_data(message, f"{HUB} is downloaded and cached", layout)
    return {split: read_json(data_dir / file) for split, file in FILES.items()}


def read_json(path: Path) -> list[Question]:
    """Read the questions of one published file. Raises `UserError`, naming a field, if it is missing or has another type."""
    questions: dict[str, Question] = {}
    for place, question in _parse(read_json_file(path), path):
        if question.id in questions:
            raise UserError(f"{path}: {place}.id {question.id[:80]!r} is also the id of another question")
        questions[question.id] = question
    if not questions:
        raise UserError(f"{path} has no questions")
    return list(questions.values())


def _parse(content: Any, path: Path) -> Iterator[tuple[str, Question]]:
    """Yield each question with its path in the file."""

    def get(node: Any, place: str, key: str, kind: type) -> Any:
        if not isinstance(node, dict):
            raise UserError(f"{path}: {place} is {_type(node)}, not an object with {key!r}")
        if key not in node:
            raise UserError(f"{path}: {place} has no {key!r}")
        value = node[key]
        if type(value) is not kind:
            raise UserError(f"{path}: {place}.{key} is {_type(value)}, not {_TYPES[kind]}")
        return value

    def parts(node: Any, place: str, key: str) -> Iterator[tuple[str, Any]]:
        for number, part in enumerate(get(node, place, key, list)):
            yield f"{place}.{key}[{number}]".removeprefix("the file."), part

    for place, article in parts(content, "the file", "data"):
        for inner, paragraph in parts(article, place, "paragraphs"):
            context = get(paragraph, inner, "context", str)
            for at, asked in parts(paragraph, inner, "qas"):
                answers = [
                    (get(a, there, "text", str), get(a, there, "answer_start", int)) for there, a in parts(asked, at, "answers")
                ]
                if not answers:
                    raise UserError(f"{path}: {at} has no answer; in SQuAD v1.1 every question has one (v2.0 is another task)")
                yield at, Question(get(asked, at, "id", str), get(asked, at, "question", str), context, tuple(answers))


_TYPES = {dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a float", bool: "a boolean"}


def _type(value: Any) -> str:
    return _TYPES.get(type(value), "null")


def read_hub() -> dict[str, list[Question]]:
    """Read both splits from the hub, or its cache, by means of `datasets`."""
    with from_hub(HUB, f"a folder with {' and '.join(FILES.values())}"):
        from datasets import load_dataset

        data = load_dataset(HUB)
    return {
        split: [
            Question(id, question, context, tuple(zip(answers["text"], answers["answer_start"], strict=True)))
            for id, question, context, answers in zip(
                *(data[split][column] for column in ("id", "question", "context", "answers")), strict=True
            )
        ]
        for split in FILES
    }

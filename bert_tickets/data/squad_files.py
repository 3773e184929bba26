"""The data of SQuAD v1.1: questions, read from the published files or from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_tickets.data.hub import find_dataset
from bert_tickets.errors import UserError
from bert_tickets.files import read_json as read_json_file
from bert_tickets.hub import Repository

FILES = {"train": "train-v1.1.json", "validation": "dev-v1.1.json"}
HUB = Repository("dataset", "rajpurkar/squad", f"--data-dir a folder with the published files {' and '.join(FILES.values())}")
CONFIG = "plain_text"


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
            raise HUB.unavailable(f"no SQuAD data: {data_dir / file} does not exist")
    return {split: read_json(data_dir / file) for split, file in FILES.items()}


def read_json(path: Path) -> list[Question]:
    """Read the questions of one published file. Raises `UserError`, naming the place, if a field is missing or mistyped."""
    questions: dict[str, Question] = {}
    for place, question in _parse(read_json_file(path), path):
        if not question.answers:
            raise UserError(f"{path}: {place} has no answer; in SQuAD v1.1 every question has one (v2.0 is another task)")
        if question.id in questions:
            raise UserError(f"{path}: {place}.id {question.id[:80]!r} is also the id of another question")
        questions[question.id] = question
    if not questions:
        raise UserError(f"{path} has no questions")
    return list(questions.values())


def _parse(content: Any, path: Path) -> Iterator[tuple[str, Question]]:
    """Yield each question with its place in the file."""
    place = "the file"
    try:
        for i, article in enumerate(content["data"]):
            place = f"data[{i}]"
            for j, paragraph in enumerate(article["paragraphs"]):
                place = f"data[{i}].paragraphs[{j}]"
                context = paragraph["context"]
                for k, asked in enumerate(paragraph["qas"]):
                    place = f"data[{i}].paragraphs[{j}].qas[{k}]"
                    answers = tuple((answer["text"], answer["answer_start"]) for answer in asked["answers"])
                    texts = [asked["id"], asked["question"], context, *(text for text, _ in answers)]
                    if not all(isinstance(text, str) for text in texts) or not all(isinstance(at, int) for _, at in answers):
                        raise TypeError
                    "".join(texts).encode()
                    yield place, Question(asked["id"], asked["question"], context, answers)
    except KeyError as error:
        raise UserError(f"{path}: {place} has no {error}") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UserError(f"{path}: {place} has half of a surrogate pair, {half}, which is not a character") from None
    except TypeError:
        raise UserError(f"{path}: {place}, or a field of it, has another type than in SQuAD v1.1") from None


def read_hub() -> dict[str, list[Question]]:
    """Read both splits from the hub, or its cache."""
    splits: dict[str, list[Question]] = {split: [] for split in FILES}
    data = find_dataset(HUB, CONFIG, list(splits))
    for split, questions in splits.items():
        for columns in data.columns(split, ["id", "question", "context", "answers"]):
            for id, question, context, answers in zip(*columns, strict=True):
                given = zip(answers["text"], answers["answer_start"], strict=True)
                questions.append(Question(id, question, context, tuple(given)))
    return splits

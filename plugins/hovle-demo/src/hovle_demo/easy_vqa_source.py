"""easy-VQA: pictures of one coloured shape, questions, and the split of its author."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from hovle_demo.packages import EASY_VQA
from hovle_demo.picture import Picture, read_picture
from hovle_demo.split import rank

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
_NEGATED = re.compile(r"\b(?:no|not)\b")


@dataclass(frozen=True)
class Question:
    """`picture` is a key of the split's pictures; `number` the place in the author's file."""

    text: str
    answer: str
    picture: str
    number: int

    @property
    def is_negated(self) -> bool:
        """ "is there not a circle?": its answer turns around what is seen."""
        return _NEGATED.search(self.text) is not None

    @property
    def is_open(self) -> bool:
        """Open questions ask for a shape or a colour; the others for yes or no."""
        return self.answer not in ("yes", "no")


@dataclass(frozen=True)
class EasyVqa:
    """One split: pictures by key, questions in the author's order."""

    pictures: dict[str, Picture]
    questions: list[Question]


def load_easy_vqa(
    split: Literal["train", "test"],
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EasyVqa:
    """The author's split, 64 x 64 pixels as they are; `limit` keeps the first pictures and their questions."""
    root = EASY_VQA.root()
    files = [path for path in EASY_VQA.files() if path.suffix == ".png" and path.parent.parent.name == split]
    pictures = {}
    files = sorted(files, key=lambda path: int(path.stem))[:limit]
    for done, path in enumerate(files, start=1):
        key = _key(split, int(path.stem))
        pictures[key] = read_picture(key, path)
        if progress:
            progress(done, len(files))
    rows = json.loads((root / split / "questions.json").read_text(encoding="utf-8"))
    questions = [
        Question(text, answer, _key(split, picture), number)
        for number, (text, answer, picture) in enumerate(rows)
    ]
    return EasyVqa(pictures, [question for question in questions if question.picture in pictures])


def balance_yes_no(questions: Iterable[Question], seed: int) -> list[Question]:
    """As many yes as no for each question text, so that the text alone says nothing about the answer."""
    groups: dict[str, dict[str, list[Question]]] = defaultdict(lambda: {"yes": [], "no": []})
    for question in questions:
        if not question.is_open:
            groups[question.text][question.answer].append(question)
    kept = []
    for answers in groups.values():
        size = min(len(answers["yes"]), len(answers["no"]))
        for same in answers.values():
            kept += sorted(same, key=lambda question: rank(seed, "yes-no", question.number))[:size]
    return sorted(kept, key=lambda question: question.number)


def describe(questions: Iterable[Question]) -> dict[str, str]:
    """Picture key -> "a blue triangle", where a picture's own questions and answers tell both colour and shape."""
    seen: dict[str, dict[str, str]] = defaultdict(dict)
    for question in questions:
        words = question.text.rstrip("?").split()
        if question.is_open:
            # "what color is the circle?" "blue": what an open question takes for granted is there, too.
            words.append(question.answer)
        elif question.answer != ("no" if question.is_negated else "yes"):
            continue  # it says what is not there
        for word in words:
            kind = "color" if word in COLORS else "shape" if word in SHAPES else None
            if kind and seen[question.picture].setdefault(kind, word) != word:
                raise ValueError(
                    f"easy-vqa {EASY_VQA.version}: question {question.number} contradicts an earlier one about "
                    f"{question.picture} ({kind} {word} or {seen[question.picture][kind]}); reinstall the package"
                )
    return {
        key: f"a {parts['color']} {parts['shape']}"
        for key, parts in seen.items()
        if {"color", "shape"} <= set(parts)
    }


def _key(split: str, number: int) -> str:
    return f"easyvqa-{split}-{number:04d}"

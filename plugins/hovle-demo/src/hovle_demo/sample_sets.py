"""The demo's shard sets, as samples: which picture and which text go where."""

from collections.abc import Iterable, Iterator
from typing import Any

from hovle_data.schema import Message, Sample
from hovle_demo.easy_vqa_source import Question, balance_yes_no, describe
from hovle_demo.picture import Picture
from hovle_demo.questions import Qa, about_country, about_emoji, about_flag, other_names
from hovle_demo.sources import Sources
from hovle_demo.split import Split, rank

NUM_DISTRACTORS = 9
NUM_SKEWED = 10_000  # of 28,407; more than a run draws
LINES_A_SAMPLE = 12  # questions and names are short; a dozen lines are about as long as a paragraph

# What trains, and what is only ever looked at by the evaluation.
TRAIN_SETS = (
    "images",
    "text",
    "text_captions",
    "chat_text",
    "chat_open",
    "chat_skewed",
    "chat_yes_no",
    "chat_negated",
    "captions",
    "captions_flags",
    "vqa_open",
    "vqa_yes_no",
    "vqa_negated",
    "vqa_emoji",
    "vqa_flags",
)
HELD_OUT_SETS = (
    "text_heldout",
    "captions_flags_test",
    "emoji_val",
    "emoji_test",
    "vqa_test_open",
    "vqa_test_yes_no",
)


def build_sets(sources: Sources, seed: int) -> dict[str, list[Sample]]:
    """All sets by name. Every key is unique over all of them; meta says source and concept or country."""
    open_questions = _open(sources.easy_train.questions)
    # Balanced, "the picture has it" and "the question is negated" say nothing each alone about the answer. Learning
    # both at once stalls, so the two kinds are sets of their own; the skewed set has some of both as the author asks.
    balanced = balance_yes_no(sources.easy_train.questions, seed)
    plain = [question for question in balanced if not question.is_negated]
    negated = [question for question in balanced if question.is_negated]
    asked = _yes_no(sources.easy_train.questions)
    skewed = sorted(asked, key=lambda question: rank(seed, "skewed", question.number))[:NUM_SKEWED]
    return {
        "images": list(_images(sources)),
        "text": [*_prose(sources, "train"), *_lines(sources, seed)],
        "text_captions": list(_text_captions(sources)),
        "chat_text": list(_chat_text(sources, seed)),
        "chat_open": list(_chat_easy_vqa("chat-open", sources, open_questions)),
        "chat_skewed": list(_chat_easy_vqa("chat-skewed", sources, skewed)),
        "chat_yes_no": list(_chat_easy_vqa("chat-yesno", sources, plain)),
        "chat_negated": list(_chat_easy_vqa("chat-negated", sources, negated)),
        "captions": list(_captions(sources)),
        "vqa_open": _easy_vqa("vqa-open", sources, "train", open_questions),
        "vqa_yes_no": _easy_vqa("vqa-yesno", sources, "train", plain),
        "vqa_negated": _easy_vqa("vqa-negated", sources, "train", negated),
        "vqa_emoji": list(_vqa_emoji(sources, seed)),
        "vqa_flags": list(_vqa_flags(sources)),
        "text_heldout": list(_prose(sources, "test")),
        "captions_flags": list(_flag_captions(sources, "train")),
        "captions_flags_test": list(_flag_captions(sources, "test")),
        "emoji_val": list(_ranking(sources, "val", seed)),
        "emoji_test": list(_ranking(sources, "test", seed)),
        "vqa_test_open": _easy_vqa("vqa-test-open", sources, "test", _open(sources.easy_test.questions)),
        "vqa_test_yes_no": _easy_vqa("vqa-test-yesno", sources, "test", _yes_no(sources.easy_test.questions)),
    }


def _images(sources: Sources) -> Iterator[Sample]:
    """Pictures without text: train concepts, unnamed extras, train flags, train shapes."""
    # An unnamed extra can look exactly like something held out, so looks decide and not names.
    held_out = {emoji.picture.pixels for emoji in sources.emojis if emoji.split in ("val", "test")}
    held_out |= {flag.picture.pixels for flag in sources.flags if flag.split == "test"}
    held_out |= {picture.pixels for picture in sources.easy_test.pictures.values()}
    candidates: list[tuple[Picture, dict[str, Any]]] = []
    candidates += [(emoji.picture, {"source": "openmoji", "concept": emoji.name}) for emoji in sources.emojis]
    candidates += [(flag.picture, {"source": "flags", "country": flag.group}) for flag in sources.flags]
    candidates += [(picture, {"source": "easy-vqa"}) for picture in sources.easy_train.pictures.values()]
    seen: set[str] = set()
    for picture, meta in candidates:
        if picture.pixels not in held_out and picture.pixels not in seen:
            seen.add(picture.pixels)
            yield Sample(key=f"image-{picture.key}", images=(picture.png,), meta=meta)


def _prose(sources: Sources, split: Split) -> Iterator[Sample]:
    numbers: dict[str, int] = {}
    for paragraph, code in sources.prose(split).items():
        number = numbers[code] = numbers.get(code, -1) + 1
        meta = {"source": "factbook", "country": code}
        yield Sample(key=f"factbook-{code}-{number:03d}", text=paragraph, meta=meta)


def _lines(sources: Sources, seed: int) -> Iterator[Sample]:
    """Questions with answers and captions as plain text: words that the LLM will need and that prose lacks."""
    lines = [f"{question.text} {question.answer}" for question in sources.easy_train.questions]
    lines += describe(sources.easy_train.questions).values()
    lines += [name for _, name in sources.named("train")]
    for flag in sources.flags:
        if flag.split == "train":
            # Descriptions are part of the prose already.
            lines += [f"{qa.question} {qa.answer}" for qa in about_flag(flag) if qa.topic != "description"]
    for country in sources.countries:
        if sources.split_of_country[country.code] == "train":
            lines += [f"{qa.question} {qa.answer}" for qa in about_country(country)]
    ordered = sorted(set(lines), key=lambda line: rank(seed, "lines", line))
    for number, start in enumerate(range(0, len(ordered), LINES_A_SAMPLE)):
        text = "\n".join(ordered[start : start + LINES_A_SAMPLE])
        yield Sample(key=f"lines-{number:04d}", text=text, meta={"source": "lines"})


def _text_captions(sources: Sources) -> Iterator[Sample]:
    """What alignment will ask, in words: a caption stands for the picture, and its caption follows."""
    for sample in _captions(sources):
        told = f"{sample.text}\n{sample.text}"
        yield Sample(key=f"text-{sample.key}", text=told, meta=sample.meta)


def _chat_easy_vqa(prefix: str, sources: Sources, questions: Iterable[Question]) -> Iterator[Sample]:
    """Conversations in which a caption stands for the picture: an LLM learns to answer from what it is told.

    Alignment then only has to make pictures say what captions say.
    """
    captions = describe(sources.easy_train.questions)
    for question in questions:
        if question.picture in captions:
            told = f"{captions[question.picture]}\n{question.text}"
            meta = {"source": "easy-vqa"}
            yield _conversation(f"{prefix}-{question.number:05d}", None, told, question.answer, meta)


def _chat_text(sources: Sources, seed: int) -> Iterator[Sample]:
    """The same for emoji, whose name stands for the picture, and facts about countries, which need none."""
    train = sources.named("train")
    others = other_names(train, seed)
    for emoji, name in train:
        for qa in about_emoji(name, others[emoji.picture.key]):
            told = qa._replace(question=f"{name}\n{qa.question}")
            yield _about(f"chat-{emoji.picture.key}", None, told, {"source": "openmoji", "concept": name})
    for country in sources.countries:
        if sources.split_of_country[country.code] == "train":
            for qa in about_country(country):
                meta = {"source": "factbook", "country": country.code}
                yield _about(f"chat-factbook-{country.code}", None, qa, meta)


def _captions(sources: Sources) -> Iterator[Sample]:
    for emoji, name in sources.named("train"):
        meta = {"source": "openmoji", "concept": name}
        yield _pair(f"caption-{emoji.picture.key}", emoji.picture, name, meta)
    for key, caption in describe(sources.easy_train.questions).items():
        meta = {"source": "easy-vqa", "concept": caption}
        yield _pair(f"caption-{key}", sources.easy_train.pictures[key], caption, meta)


def _flag_captions(sources: Sources, split: Split) -> Iterator[Sample]:
    for flag in sources.flags:
        if flag.split == split and flag.description:
            meta = {"source": "flags", "country": flag.group}
            yield _pair(f"caption-{flag.picture.key}", flag.picture, flag.description, meta)


def _ranking(sources: Sources, split: Split, seed: int) -> Iterator[Sample]:
    """Unseen concepts with their name, and nine other names of the same split in meta.

    Distractors are unseen, too: a name that was trained would be the likelier one whatever the picture shows.
    """
    held_out = sources.named(split)
    for emoji, name in held_out:
        others = {
            other: None for candidate, other in held_out if candidate.head != emoji.head and other != name
        }
        chosen = sorted(others, key=lambda other: rank(seed, "distractor", name, other))[:NUM_DISTRACTORS]
        meta = {"source": "openmoji", "concept": name, "name": name, "distractors": chosen}
        yield _pair(f"{split}-{emoji.picture.key}", emoji.picture, name, meta)


def _easy_vqa(prefix: str, sources: Sources, split: Split, questions: Iterable[Question]) -> list[Sample]:
    pictures = (sources.easy_train if split == "train" else sources.easy_test).pictures
    return [
        _conversation(
            f"{prefix}-{question.number:05d}",
            pictures[question.picture],
            question.text,
            question.answer,
            {
                "source": "easy-vqa",
                "question": question.text,
                "answer": question.answer,
                "picture": question.picture,
            },
        )
        for question in questions
    ]


def _vqa_emoji(sources: Sources, seed: int) -> Iterator[Sample]:
    train = sources.named("train")
    others = other_names(train, seed)
    for emoji, name in train:
        for qa in about_emoji(name, others[emoji.picture.key]):
            meta = {"source": "openmoji", "concept": name, "question": qa.question, "answer": qa.answer}
            yield _about(f"vqa-{emoji.picture.key}", emoji.picture, qa, meta)


def _vqa_flags(sources: Sources) -> Iterator[Sample]:
    for flag in sources.flags:
        if flag.split == "train":
            for qa in about_flag(flag):
                meta = {
                    "source": "flags",
                    "country": flag.group,
                    "question": qa.question,
                    "answer": qa.answer,
                }
                yield _about(f"vqa-{flag.picture.key}", flag.picture, qa, meta)


def _open(questions: Iterable[Question]) -> list[Question]:
    return [question for question in questions if question.is_open]


def _yes_no(questions: Iterable[Question]) -> list[Question]:
    return [question for question in questions if not question.is_open]


def _pair(key: str, picture: Picture, text: str, meta: dict[str, Any]) -> Sample:
    return Sample(key=key, images=(picture.png,), text=text, meta=meta)


def _about(prefix: str, picture: Picture | None, qa: Qa, meta: dict[str, Any]) -> Sample:
    return _conversation(f"{prefix}-{qa.topic}", picture, qa.question, qa.answer, meta)


def _conversation(
    key: str, picture: Picture | None, question: str, answer: str, meta: dict[str, Any]
) -> Sample:
    content: Any = question
    if picture:
        content = [{"type": "image"}, {"type": "text", "text": question}]
    messages: tuple[Message, ...] = (
        {"role": "user", "content": content},
        {"role": "assistant", "content": answer},
    )
    return Sample(key=key, images=(picture.png,) if picture else (), messages=messages, meta=meta)

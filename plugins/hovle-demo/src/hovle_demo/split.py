"""Train and test by a hash of a name: stable across runs, seeds, machines and data that is added later."""

import hashlib
import re
from typing import Literal

Split = Literal["train", "val", "test"]

FOLDS = 10

# Words that say who or how, not what: "man cook" and "woman cook" show one concept, "cat face" is a cat.
# fmt: off
_LIGHT_WORDS = frozenset({
    "man", "woman", "men", "women", "person", "people", "boy", "girl", "child", "adult", "older",
    "face", "skin", "tone", "light", "medium", "dark", "medium-light", "medium-dark",
    "facing", "left", "right", "leftwards", "rightwards", "a", "an", "the", "and", "or", "on",
})
# fmt: on
# What follows these says more about the concept named before them: "grinning cat with smiling eyes" is a cat.
_TAIL = re.compile(r" (?:with|without|in|of|at|behind|showing) ")


def fold(key: str) -> int:
    """0..9, from sha1: a tenth of all keys lies in each fold."""
    return int(hashlib.sha1(key.encode()).hexdigest(), 16) % FOLDS


def concept_split(head: str) -> Split:
    """A tenth of the head words is for the test, a tenth for validation."""
    return {0: "test", 1: "val"}.get(fold(head), "train")  # type: ignore[return-value]


def country_split(group: str) -> Split:
    """A tenth of the countries (groups of one flag) is held out: their flags, facts and prose alike."""
    return "test" if fold(group) == 0 else "train"


def head_word(name: str) -> str:
    """The word an emoji name turns on, the unit of the split: "cat face" and "black cat" -> "cat"."""
    plain = re.sub(r"\([^)]*\)", "", name.lower()).replace("’s", "")
    core = _TAIL.split(plain)[0]
    # Where the words that name something all come after ("woman with headscarf"), the whole name is looked at.
    words = _content_words(core) or _content_words(plain) or re.findall(r"\w+", plain)
    last = words[-1]
    return (
        last[:-1] if len(last) > 3 and last.endswith("s") and not last.endswith(("ss", "us", "is")) else last
    )


def _content_words(text: str) -> list[str]:
    return [word for word in re.findall(r"[^\W\d_’]+(?:’[^\W\d_]+)?", text) if word not in _LIGHT_WORDS]


def rank(seed: int, *names: object) -> int:
    """A number that looks random, the same on every machine: sort by it to shuffle, take the first n to sample."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:8], "big")

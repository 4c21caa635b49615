"""Questions about emoji and flags, in words: what the Factbook and a name can answer."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from hovle_demo.emoji_source import Emoji
from hovle_demo.factbook import Country
from hovle_demo.flags_source import Flag
from hovle_demo.split import rank

NAME_QUESTIONS = ("What is this?", "What does the picture show?")
COUNTRY_QUESTION = "Which country's flag is this?"
DESCRIBE_QUESTION = "Describe this flag."


class Qa(NamedTuple):
    """`topic` tells the questions about one picture apart: "country", "capital", "yes", "no", ..."""

    topic: str
    question: str
    answer: str


def is_it(name: str) -> str:
    """ "Is this an apple?"; names that take no article ("scissors", "Leo") stay without."""
    last = name.split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if plural or not re.match(r"[a-z]", name):
        return f"Is this {name}?"
    return f"Is this {'an' if name[0] in 'aeiou' else 'a'} {name}?"


def other_names(named: Sequence[tuple[Emoji, str]], seed: int) -> dict[str, str]:
    """Picture key -> the name of another concept, in random order and each name once.

    Each once: so "Is this a pizza?" is asked as often with the answer no as with the answer yes.
    Raises ValueError where one head word has more than half of the names.
    """
    ordered = sorted(
        named, key=lambda item: (rank(seed, item[0].head), item[0].head or "", rank(seed, item[1]))
    )
    # Heads lie side by side now, so a step as long as the largest head always leads to another one.
    step = max(Counter(emoji.head for emoji, _ in named).values())
    if 2 * step > len(ordered):
        raise ValueError(f"{step} of {len(ordered)} emoji share a head word; give names of more concepts")
    rotated = ordered[step:] + ordered[:step]
    return {emoji.picture.key: name for (emoji, _), (_, name) in zip(ordered, rotated, strict=True)}


def about_emoji(name: str, other: str) -> list[Qa]:
    """Its name, asked in two ways; and one question with the answer yes, one, about another concept, with no."""
    return [
        *(Qa(f"name-{number}", question, name) for number, question in enumerate(NAME_QUESTIONS)),
        Qa("yes", is_it(name), "yes"),
        Qa("no", is_it(other), "no"),
    ]


def about_flag(flag: Flag) -> list[Qa]:
    """What is seen on it; which country, its capital and region only where one country flies it."""
    found = []
    if flag.country:
        country = flag.country
        found.append(Qa("country", COUNTRY_QUESTION, country.name))
        if country.capital:
            found.append(Qa("capital", "What is the capital of the country with this flag?", country.capital))
        if country.region:
            found.append(Qa("region", "In which region is the country with this flag?", country.region))
    if flag.colors:
        found.append(Qa("colors", "What colors are on this flag?", listed(flag.colors)))
    if flag.description:
        found.append(Qa("description", DESCRIBE_QUESTION, flag.description))
    return found


def about_country(country: Country) -> list[Qa]:
    """The facts as questions that need no picture."""
    found = []
    if country.capital:
        found.append(Qa("capital", f"What is the capital of {country.name}?", country.capital))
    if country.region:
        found.append(Qa("region", f"In which region is {country.name}?", country.region))
    return found


def listed(words: Sequence[str]) -> str:
    """("red", "white", "blue") -> "red, white and blue"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

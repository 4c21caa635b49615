"""The World Factbook: prose and a few facts of each country."""

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hovle_demo.packages import FACTBOOK

MIN_WORDS = 15  # shorter fields are numbers, lists and fragments
MAX_WORDS = 120  # longer fields are cut at sentence ends, so that one sample is about one paragraph

REGIONS = frozenset(
    {
        "Africa",
        "Antarctic Region",
        "Arctic Region",
        "Asia",
        "Central America and the Caribbean",
        "Europe",
        "Middle East",
        "North America",
        "Oceania",
        "South America",
        "Southeast Asia",
    }
)
# Two entries do not say their flag's code in the usual way: France lists its overseas parts, the UK is .uk.
_ISO_BY_HAND = {"fr": "fr", "uk": "gb"}
_NAME_BY_HAND = {
    "cg": "Democratic Republic of the Congo",  # "DRC"
    "dr": "Dominican Republic",  # "The Dominican"
    "ee": "European Union",  # no name in the usual place
    "gz": "Gaza Strip",  # "Gaza, Gaza Strip"
}
_NO_CAPITAL = re.compile(r"none|na|n/a|no official|administered from")
_TOP_LEVEL_DOMAIN = re.compile(r"\.([a-z]{2})\b")
_TAG = re.compile(r"<[^>]*>")
_SENTENCE_END = re.compile(r"(?<=[.;]) +")
_FLAG_PART = re.compile(r"<strong>\s*(description|meaning|history)\s*:\s*</strong>")


@dataclass(frozen=True)
class Country:
    """One entry. `code` is the Factbook's own, `iso` the two letters of its flag; what is not said is None."""

    code: str
    name: str
    iso: str | None
    capital: str | None
    region: str | None
    flag_description: str | None
    flag_meaning: str | None
    paragraphs: tuple[str, ...]


def load_countries() -> list[Country]:
    """All 256 entries (countries, territories, oceans, the world), sorted by file."""
    return [_read(path) for path in FACTBOOK.files()]


def clean(markup: str) -> str:
    """Text without tags and entities, on one line."""
    return " ".join(html.unescape(_TAG.sub("", re.sub(r"<br\s*/?>", " ", markup))).split())


def _read(path: Path) -> Country:
    entry = json.loads(path.read_text(encoding="utf-8"))
    domain = _TOP_LEVEL_DOMAIN.findall(_text(entry, "Communications", "Internet country code"))
    iso = _ISO_BY_HAND.get(path.stem) or (domain[0] if len(domain) == 1 else None)
    parts = _flag_parts(_text(entry, "Government", "Flag"))
    names = ("Government", "Country name")
    capital = _first(_text(entry, "Government", "Capital", "name"))
    region = _first(_text(entry, "Geography", "Map references").replace("metropolitan France:", ""))
    return Country(
        code=path.stem,
        name=_NAME_BY_HAND.get(path.stem)
        or _first(_text(entry, *names, "conventional short form"))
        or _first(_text(entry, *names, "conventional long form"))
        or path.stem,
        iso=iso,
        capital=None if not capital or _NO_CAPITAL.match(capital.lower()) else capital,
        region=region if region in REGIONS else None,
        flag_description=parts.get("description"),
        flag_meaning=parts.get("meaning"),
        paragraphs=tuple(dict.fromkeys(piece for text in _strings(entry) for piece in _paragraphs(text))),
    )


def _text(entry: Any, *path: str) -> str:
    """The "text" at `path`, or "" where an entry does not have it."""
    for key in path:
        entry = entry.get(key, {}) if isinstance(entry, dict) else {}
    return str(entry.get("text", "")) if isinstance(entry, dict) else ""


def _first(markup: str) -> str | None:
    """The first of several answers, without remarks: "La Paz (administrative capital); Sucre ..." -> "La Paz"."""
    first = clean(re.split(r"<br", markup.strip())[0])
    first = re.split(r";| \(| - |, note| in ", first)[0].strip(" ,")
    return None if not first or first.lower() == "none" else first


def _flag_parts(markup: str) -> dict[str, str]:
    """ "<strong>description:</strong> ...<br><strong>meaning:</strong> ..." -> {"description": ..., "meaning": ...}."""
    pieces = _FLAG_PART.split(markup)
    parts = {label: clean(text) for label, text in zip(pieces[1::2], pieces[2::2], strict=True)}
    return {label: text for label, text in parts.items() if text}


def _strings(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        for value in entry.values():
            yield from _strings(value)
    elif isinstance(entry, list):
        for value in entry:
            yield from _strings(value)


def _paragraphs(markup: str) -> Iterator[str]:
    """Pieces of `MIN_WORDS` to about `MAX_WORDS` words; a blank line in the markup and a full stop may end one."""
    for block in re.split(r"(?:<br\s*/?>\s*){2,}", markup):
        piece: list[str] = []
        sentences = (sentence.split() for sentence in _SENTENCE_END.split(clean(block)))
        # A list of names can be one "sentence" of hundreds of words.
        for words in (part[i : i + MAX_WORDS] for part in sentences for i in range(0, len(part), MAX_WORDS)):
            if piece and len(piece) + len(words) > MAX_WORDS:
                if len(piece) >= MIN_WORDS:
                    yield " ".join(piece)
                piece = []
            piece += words
        if len(piece) >= MIN_WORDS:
            yield " ".join(piece)

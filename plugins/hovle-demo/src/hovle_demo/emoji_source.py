"""OpenMoji drawings with the names that the `emoji` package gives them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import emoji

from hovle_demo.packages import EMOJI, OPENMOJI
from hovle_demo.picture import Picture, render_pictures
from hovle_demo.split import Split, concept_split, head_word, rank

_SKIN_TONE = re.compile(r"-1F3F[B-F]")
_COUNTRY_FLAG = re.compile(r"1F1(?:E[6-9A-F]|F[0-9A-F])-1F1(?:E[6-9A-F]|F[0-9A-F])")
# England, Scotland, Wales and the like: tag sequences that start with a black flag.
_SUBDIVISION_FLAG = re.compile(r"1F3F4-E00")
_FULLY_QUALIFIED = 2


@dataclass(frozen=True)
class Emoji:
    """One drawing. `name`, `head` and `split` are None for OpenMoji's extras, which nobody has named."""

    picture: Picture
    name: str | None = None
    head: str | None = None
    split: Split | None = None


def svg_files() -> dict[str, Path]:
    """Code points without the variation selector ("1F9F9", "1F468-200D-1F33E") -> file, in sorted order."""
    return {_code(path.stem.split("-")): path for path in OPENMOJI.files()}


def iso_of(code: str) -> str | None:
    """ "1F1EB-1F1F7" -> "fr"; None for what is not a country's flag."""
    if not _COUNTRY_FLAG.fullmatch(code):
        return None
    return "".join(chr(int(part, 16) - 0x1F1E6 + ord("a")) for part in code.split("-"))


def load_emojis(limit: int | None = None, progress: Callable[[int, int], None] | None = None) -> list[Emoji]:
    """Every drawing that is no flag and has no skin tone, each look once, the named ones first.

    Skin-tone variants are left out: they would be 2,030 near-copies of hands and people.
    `limit` keeps about so many, drawn at random from all.
    """
    names = _english_names()
    files = {
        code: path
        for code, path in svg_files().items()
        if not (_SKIN_TONE.search(code) or _COUNTRY_FLAG.fullmatch(code) or _SUBDIVISION_FLAG.match(code))
    }
    if limit is not None:
        files = {code: files[code] for code in sorted(files, key=lambda code: rank(0, "limit", code))[:limit]}
    # Named ones first, neutral before gendered (shorter code): of two that look the same the first one stays.
    order = sorted(files, key=lambda code: (code not in names, len(code), code))
    found: dict[str, Emoji] = {}
    drawings = [(f"openmoji-{code}", files[code]) for code in order]
    for code, picture in zip(order, render_pictures(drawings, progress), strict=True):
        if picture.pixels not in found:
            name = names.get(code)
            head = head_word(name) if name else None
            found[picture.pixels] = Emoji(picture, name, head, concept_split(head) if head else None)
    return list(found.values())


def _english_names() -> dict[str, str]:
    """Code points -> "hot dog", for every fully qualified emoji."""
    names = {
        _code([f"{ord(character):04X}" for character in characters]): str(data["en"])
        .strip(":")
        .replace("_", " ")
        for characters, data in emoji.EMOJI_DATA.items()
        if data["status"] == _FULLY_QUALIFIED
    }
    EMOJI.root()
    EMOJI.check_names(f"{code} {name}" for code, name in names.items())
    return names


def _code(parts: list[str]) -> str:
    return "-".join(part for part in parts if part != "FE0F")

"""OpenMoji's country flags, joined with the Factbook's descriptions and split together with its countries."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hovle_demo.emoji_source import iso_of, svg_files
from hovle_demo.factbook import Country
from hovle_demo.picture import Picture, render_pictures
from hovle_demo.split import Split, country_split

_COLORS = re.compile(
    r"\b(red|white|blue|green|yellow|gold|black|orange|maroon|purple|brown|gray|silver|turquoise|crimson)\b"
)


@dataclass(frozen=True)
class Flag:
    """One look: all the flags that are drawn the same, e.g. of Romania and Chad, share picture, group and split."""

    group: str
    picture: Picture
    countries: tuple[Country, ...]
    split: Split

    @property
    def country(self) -> Country | None:
        """The one country that flies it; None if several do (their names could not be told apart) or none is known."""
        return self.countries[0] if len(self.countries) == 1 else None

    @property
    def description(self) -> str | None:
        """What is seen on it, in the Factbook's words."""
        return next((c.flag_description for c in self.countries if c.flag_description), None)

    @property
    def colors(self) -> tuple[str, ...]:
        """The colors that the description names, in its order."""
        return tuple(dict.fromkeys(_COLORS.findall((self.description or "").lower())))


def load_flags(
    countries: Sequence[Country], progress: Callable[[int, int], None] | None = None
) -> list[Flag]:
    """One entry a look, sorted by group ("ro-td"); `countries` are those of `load_countries`."""
    by_iso: dict[str, list[Country]] = defaultdict(list)
    for country in countries:
        if country.iso:
            by_iso[country.iso].append(country)
    files = {iso: path for code, path in svg_files().items() if (iso := iso_of(code))}
    looks: dict[str, tuple[Picture, list[str]]] = {}
    drawings = [(f"flag-{iso}", files[iso]) for iso in sorted(files)]
    for iso, picture in zip(sorted(files), render_pictures(drawings, progress), strict=True):
        looks.setdefault(picture.pixels, (picture, []))[1].append(iso)
    return [
        Flag(
            group="-".join(isos),
            picture=picture,
            countries=tuple(country for iso in isos for country in by_iso[iso]),
            split=country_split("-".join(isos)),
        )
        for picture, isos in looks.values()
    ]


def split_countries(countries: Sequence[Country], flags: Sequence[Flag]) -> dict[str, Split]:
    """Factbook code -> split. A country goes with its flag; one without a flag goes by its own code."""
    by_flag = {country.code: flag.split for flag in flags for country in flag.countries}
    return {country.code: by_flag.get(country.code) or country_split(country.code) for country in countries}

"""Everything the demo's shards are made from, read once."""

from collections.abc import Callable
from dataclasses import dataclass

from hovle_demo.easy_vqa_source import EasyVqa, load_easy_vqa
from hovle_demo.emoji_source import Emoji, load_emojis
from hovle_demo.factbook import Country, load_countries
from hovle_demo.flags_source import Flag, load_flags, split_countries
from hovle_demo.split import Split


@dataclass(frozen=True)
class Sources:
    """Drawings, flags, countries with their split by Factbook code, and the two splits of easy-VQA."""

    emojis: list[Emoji]
    flags: list[Flag]
    countries: list[Country]
    split_of_country: dict[str, Split]
    easy_train: EasyVqa
    easy_test: EasyVqa

    def named(self, split: Split) -> list[tuple[Emoji, str]]:
        """The named drawings of a split, each with its name."""
        return [(emoji, emoji.name) for emoji in self.emojis if emoji.split == split and emoji.name]

    def prose(self, split: Split) -> dict[str, str]:
        """Paragraph -> Factbook code of the first country that has it.

        What a train country says word for word as well is no held-out text and is left out of the test.
        """
        seen = self.prose("train") if split == "test" else {}
        found: dict[str, str] = {}
        for country in self.countries:
            if self.split_of_country[country.code] == split:
                for paragraph in country.paragraphs:
                    if paragraph not in seen:
                        found.setdefault(paragraph, country.code)
        return found


def load_sources(
    limit: int | None = None, progress: Callable[[str, int, int], None] | None = None
) -> Sources:
    """Reads and renders all of it; `limit` keeps so many emoji, and pictures of each easy-VQA split."""

    def told(task: str) -> Callable[[int, int], None] | None:
        return (lambda done, total: progress(task, done, total)) if progress else None

    countries = load_countries()
    flags = load_flags(countries, told("render flags"))
    return Sources(
        emojis=load_emojis(limit, told("render emoji")),
        flags=flags,
        countries=countries,
        split_of_country=split_countries(countries, flags),
        easy_train=load_easy_vqa("train", limit, told("read easy-VQA train")),
        easy_test=load_easy_vqa("test", limit, told("read easy-VQA test")),
    )

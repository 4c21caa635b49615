"""A contact sheet: one HTML file with pictures, their tiles, text, token counts and histograms."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from hovle_data.build import place, read_row
from hovle_data.checks import content_text, encode
from hovle_data.decode import decode_image
from hovle_data.inspect import Statistics
from hovle_data.mixture import Source
from hovle_data.processors import load_processor
from hovle_data.schema import Sample

PICTURE_SIDE, TILE_SIDE, GAP = 240, 72, 3  # pixels on the page
MAX_CHARACTERS = 1500
BINS = 24

# The browser itself is told to fetch nothing.
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd; }}
.row {{ display: flex; flex-wrap: wrap; gap: 1.5em; }}
.sample {{ border: 1px solid #ddd; border-radius: 6px; padding: .8em; width: 30em; overflow-wrap: anywhere; }}
.sample img {{ vertical-align: top; margin: 0 .4em .4em 0; max-width: 100%; }}
.turn {{ margin: .3em 0; white-space: pre-wrap; }} .who {{ color: #06c; font-weight: 600; }}
.note {{ color: #777; font-size: 12px; }} .bad {{ color: #b00; }}
</style></head><body>
"""


def contact_sheet(
    source: Source, statistics: Statistics, processor: str | None = None, num_samples: int = 48
) -> str:
    """HTML of evenly spread samples of a source. processor: a checkpoint whose tiles and token counts are shown;
    without it the tiles of `HovleImageProcessor()` are, and the counts that the index holds."""
    name = str(getattr(source, "name", "source"))
    loaded = None if processor is None else load_processor(processor)
    chosen = [statistics.good[n] for n in _spread(len(statistics.good), num_samples)]
    counts = getattr(source, "counts", lambda _: None)("tokens")
    counted = {i: int(counts[i]) for i in chosen} if counts is not None else {}
    cards = [_card(source, i, loaded, counted) for i in chosen]
    lengths: dict[str, Sequence[int]] = {
        "characters a sample": statistics.characters,
        "images a sample": statistics.images,
        "KiB of images a sample": [size >> 10 for size in statistics.image_bytes if size],
    }
    if counts is not None:
        lengths = {"tokens a sample": counts.tolist(), **lengths}
    elif counted:
        lengths = {"tokens a sample (of those below)": list(counted.values()), **lengths}
    return "".join(
        [
            _HEAD.format(title=escape(name)),
            f"<h1>{escape(name)}</h1><p>{len(source)} samples; {len(chosen)} of them below, evenly spread.</p>",
            _table(statistics),
            '<div class="row">',
            *(histogram(title, values) for title, values in lengths.items() if values),
            '</div><h2>Samples</h2><div class="row">',
            *cards,
            "</div></body></html>\n",
        ]
    )


def histogram(title: str, values: Sequence[int]) -> str:
    """Inline SVG of how often each length comes; the last bar holds all from the 99th percentile on."""
    array = np.asarray(values)
    low, high = int(array.min()), max(int(np.percentile(array, 99)), int(array.min()) + 1)
    bars, _ = np.histogram(np.minimum(array, high), bins=min(BINS, high - low + 1), range=(low, high + 1))
    width, tall = 300, 90
    step = width / len(bars)
    rectangles = "".join(
        f'<rect x="{n * step + 0.5:.1f}" y="{tall - tall * count / bars.max():.1f}" width="{step - 1:.1f}"'
        f' height="{tall * count / bars.max():.1f}"><title>{count}</title></rect>'
        for n, count in enumerate(bars.tolist())
    )
    more = " and more" if array.max() > high else ""
    return (
        f"<figure><figcaption>{escape(title)}: mean {array.mean():.1f}, median {np.median(array):.0f}, "
        f'largest {array.max()}</figcaption><svg width="{width}" height="{tall + 18}" fill="#48a" role="img">'
        f'{rectangles}<text x="0" y="{tall + 14}" fill="#777" font-size="11">{low}</text>'
        f'<text x="{width}" y="{tall + 14}" fill="#777" font-size="11" text-anchor="end">{high}{more}</text>'
        "</svg></figure>"
    )


def _table(statistics: Statistics) -> str:
    rows: list[tuple[str, int, str]] = [(kind, count, "") for kind, count in sorted(statistics.kinds.items())]
    reasons = Counter(bad.category for bad in statistics.bad)
    rows += [(f"bad: {reason}", count, " class=bad") for reason, count in reasons.most_common()]
    cells = "".join(f"<tr{style}><td>{escape(what)}</td><td>{count}</td></tr>" for what, count, style in rows)
    return f"<table><tr><th>kind</th><th>samples</th></tr>{cells}</table>"


def _card(source: Source, i: int, processor: Any, counted: dict[int, int]) -> str:
    """One sample. counted: tokens of samples; what the processor counts of this one is noted in it."""
    sample = read_row(source, i)
    head = f'<b>{escape(sample.key)}</b> <span class="note">{escape(sample.kind)}, {escape(place(source, i))}</span>'
    facts, pictures = [], []
    try:
        images = [decode_image(image) for image in sample.images]
        tiles = [_tiles(processor, *both) for both in zip(sample.images, images, strict=True)]
        pictures = [_picture(image) + _mosaic(*cut) for image, cut in zip(images, tiles, strict=True)]
        facts += [
            f"{x.width}x{x.height} in {len(cut[0])} tiles" for x, cut in zip(images, tiles, strict=True)
        ]
        if processor is not None:
            counted[i] = len(encode(processor, sample).input_ids)
    except ValueError as error:  # a picture that does not decode, a sample that the processor refuses
        facts.append(f'<span class="bad">{escape(str(error))}</span>')
    if i in counted:
        facts.append(f"{counted[i]} tokens")
    note = f'<div class="note">{", ".join(facts)}</div>'
    return f'<div class="sample">{head}{note}{"".join(pictures)}{_text(sample)}</div>'


def _text(sample: Sample) -> str:
    if sample.messages is None:
        return f'<div class="turn">{_cut(sample.text or "")}</div>'
    return "".join(
        f'<div class="turn"><span class="who">{escape(str(turn["role"]))}</span> {_cut(content_text(turn))}</div>'
        for turn in sample.messages
    )


def _cut(text: str) -> str:
    return escape(text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …")


def _tiles(processor: Any, data: bytes, image: Image.Image) -> tuple[Any, int]:
    """uint8 tiles `[N, S, S, 3]`, and how many stand in a row."""
    from hovle_core.image_processor import HovleImageProcessor

    cutter = HovleImageProcessor() if processor is None else processor.image_processor
    return cutter.tiles_of_file(data), cutter.grid(*image.size)[0]


def _mosaic(tiles: Any, columns: int) -> str:
    """The tiles as the model gets them, row by row; a thumbnail comes last, in a row of its own."""
    rows = -(-len(tiles) // columns)
    side = TILE_SIDE + GAP
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for n, tile in enumerate(tiles):
        small = Image.fromarray(tile).resize((TILE_SIDE, TILE_SIDE))
        sheet.paste(small, (n % columns * side, n // columns * side))
    return _embed(sheet, f"{len(tiles)} tiles")


def _picture(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return _embed(small, "picture")


def _embed(image: Image.Image, alt: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{data}">'


def _spread(length: int, wanted: int) -> list[int]:
    """At most `wanted` of 0..length-1, evenly spread."""
    return sorted({length * n // max(1, wanted) for n in range(wanted)}) if length else []

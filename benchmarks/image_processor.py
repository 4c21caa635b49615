"""Photos -> tiles on one core: HovleImageProcessor against what users copy from model cards, and against transformers.

Three photo-like JPEGs, made here: smooth noise of four scales, the finest at one pixel. Peers: the Pillow and
torchvision code of the InternVL model cards, written from the published algorithm (resize, crop, resize each crop
again, ToTensor, Normalize), whose pixels are the released ones; and transformers' GotOcr2ImageProcessor, the same
tiling on torchvision's own resize. "After decoding" starts from an RGB picture in memory, the rest from the bytes of
the file. Ours leaves tiles uint8, which the model normalises on its device; "normalized" is ours by default, which
normalises at once, as both peers do. The exact mode is measured with numba (extra `fast-images`) and without. Every
ratio is a peer's median time over ours, by turns in one process; where no size is named it is the worst of the three.
"""

import io
import json
import math
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode
from transformers import GotOcr2ImageProcessor

from hovle_core import resize
from hovle_core.config import IMAGENET_MEAN, IMAGENET_STD
from hovle_core.image_processor import HovleImageProcessor

SIZES = ((640, 480), (1920, 1280), (4000, 3000))
LARGE = SIZES[-1]
TILE, MAX_TILES, REPEATS = 448, 12, 7

TRANSFORM = transforms.Compose(
    [
        transforms.Lambda(lambda image: image.convert("RGB") if image.mode != "RGB" else image),
        transforms.Resize((TILE, TILE), interpolation=InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
)


def photo(width: int, height: int) -> bytes:
    """A JPEG of smooth noise and texture, the same every time."""
    rng = np.random.default_rng(width)
    pixels = np.full((height, width, 3), 128, np.float32)
    for columns, strength in ((8, 70), (64, 30), (width // 4, 12), (width, 4)):
        noise = rng.normal(size=(3, max(2, columns * height // width), columns)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += strength * np.asarray(layer)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def model_card(image: Image.Image) -> Tensor:
    """`[N, 3, S, S]` as the model cards' `load_image` makes it."""
    width, height = image.size
    shapes = {
        (i, j)
        for n in range(1, MAX_TILES + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if 1 <= i * j <= MAX_TILES
    }
    best_difference, best = float("inf"), (1, 1)
    for shape in sorted(shapes, key=lambda x: x[0] * x[1]):
        difference = abs(width / height - shape[0] / shape[1])
        if difference < best_difference:
            best_difference, best = difference, shape
        elif difference == best_difference and width * height > 0.5 * TILE * TILE * shape[0] * shape[1]:
            best = shape
    columns, rows = best
    resized = image.resize((TILE * columns, TILE * rows), Image.Resampling.BICUBIC)
    crops = []
    for i in range(columns * rows):
        left, top = i % columns * TILE, i // columns * TILE
        crops.append(resized.crop((left, top, left + TILE, top + TILE)))
    if len(crops) != 1:
        crops.append(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    return torch.stack([TRANSFORM(crop) for crop in crops])


def without_numba(processor: HovleImageProcessor, image: Image.Image) -> Any:
    with patch.object(resize, "SMALLEST_COMPILED", math.inf):
        return processor(image)


def by_turns(jobs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each job."""
    milliseconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(REPEATS + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if repeat:  # the first one warms up
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(sorted(times)[REPEATS // 2], 1) for name, times in milliseconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    options = {"max_tiles": MAX_TILES, "do_normalize": False}
    exact, fast = HovleImageProcessor(TILE, **options), HovleImageProcessor(TILE, **options, fast=True)
    normalized = HovleImageProcessor(TILE, max_tiles=MAX_TILES)
    got_ocr2 = GotOcr2ImageProcessor(
        size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=MAX_TILES,
        image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD,
    )  # fmt: skip
    after, differences = {}, {}
    for size in SIZES:
        data = photo(*size)
        image = opened(data)
        tiles, released = exact(image)["pixel_values"], model_card(image)
        torch.testing.assert_close(exact.normalize(tiles), released, rtol=0, atol=1e-5)
        levels = (
            released * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        ) * 255
        assert torch.equal(levels.round().to(torch.uint8), tiles), (
            "the exact mode must give the released pixels"
        )
        for name, close in (
            ("from pixels", fast.tiles(image)),
            ("from the file", fast.tiles_of_file(data)),
        ):
            difference = np.abs(close.astype(int) - exact.tiles(image))
            differences[size, name] = int(difference.max()), round(float(difference.mean()), 3)
        after[size] = by_turns(
            {
                "exact": lambda image=image: exact(image),
                "exact normalized": lambda image=image: normalized(image),
                "exact without numba": lambda image=image: without_numba(exact, image),
                "fast": lambda image=image: fast(image),
                "model card": lambda image=image: model_card(image),
                "GotOcr2": lambda image=image: got_ocr2(image, return_tensors="pt"),
            }
        )
        print(f"{size}, {len(data) >> 10} KiB, {len(tiles)} tiles, ms after decoding: {after[size]}")
    from_file = by_turns(
        {
            "exact": lambda: exact.tiles_of_file(data),
            "fast": lambda: fast.tiles_of_file(data),
            "model card": lambda: model_card(opened(data)),
            "GotOcr2": lambda: got_ocr2(opened(data), return_tensors="pt"),
        }
    )
    print(f"{LARGE}, ms from the file: {from_file}")
    print(f"(largest, mean) difference of the fast mode in levels of 255: {differences}")

    def worst(ours: str, peer: str) -> float:
        return round(min(times[peer] / times[ours] for times in after.values()), 2)

    largest, mean = differences[LARGE, "from the file"]
    result = {
        "benchmark": "image_processor",
        "ratio_after_decode": worst("exact", "model card"),
        "ratio_after_decode_without_numba": worst("exact without numba", "model card"),
        "ratio_after_decode_got_ocr2": worst("exact", "GotOcr2"),
        "ratio_after_decode_normalized": worst("exact normalized", "model card"),
        "ratio_after_decode_normalized_got_ocr2": worst("exact normalized", "GotOcr2"),
        "ratio_after_decode_fast": worst("fast", "model card"),
        "ratio_after_decode_fast_got_ocr2": worst("fast", "GotOcr2"),
        "ratio_fast": round(from_file["model card"] / from_file["fast"], 2),
        "ratio_fast_got_ocr2": round(from_file["GotOcr2"] / from_file["fast"], 2),
        "fast_largest_difference": largest,
        "fast_mean_difference": mean,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

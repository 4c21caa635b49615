"""Decode + tile + tokenize + pack with 2 workers: hovle-data against plain webdataset and torch's DataLoader.

    python benchmarks/data.py [--prepared runs/demo/prepared] [--rounds 3] [--parts speed packing seek memory]

About four minutes on two cores. Both pipelines read the same shards of photo-sized JPEGs with a question and an answer,
with the same tokenizer, and end with packed rows of normalized tiles. The plain one is what the documentation of
webdataset and the model cards of InternVL show: `WebDataset(...).shuffle().decode("pil").map(preprocess).batched()` in
a DataLoader, pictures cut by `dynamic_preprocess` and torchvision transforms. `ratio_same_tiles` gives the plain
pipeline our own tile cutting, with uint8 tiles on both sides: what is left is the pipeline alone. `ratio_fast` is our
fast mode (`model.image.fast`), whose pixels differ by `fast_mean_difference` levels of 255. Pipelines take turns; each
ratio is the median over rounds. `..._of_core_time` compares what all cores spent on a sample instead of the clock.

Also: waste of packing on the demo's instruction mix, opening and reading the middle of a 1,000,000-sample index, and
the growth of memory over 100,000 pairs.
"""

import argparse
import gc
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from transformers import AutoTokenizer

from hovle_core.image_processor import HovleImageProcessor
from hovle_core.processor import HovleProcessor, add_image_tokens
from hovle_core.testing import tiny_tokenizer
from hovle_data import (
    ConversationStream,
    Ledger,
    Mixture,
    PairStream,
    RowLoader,
    Sample,
    ShardSource,
    write_shards,
)
from hovle_data.index import ShardIndex

WORKERS, MAX_TOKENS, MAX_TILES = 2, 4096, 64
# Both pipelines read ahead in whole cycles of 32 samples (two batches of 16; two lanes of 16): the first cycle starts
# the workers and fills the buffers, and as much is in them when the clock stops as when it started.
SAMPLES, WARM_UP, MEASURED = 64, 32, 96
QUESTION, ANSWER = "What is this a picture of?", "this is a red square and a blue circle " * 4
PARTS = ("speed", "packing", "seek", "memory")
# The demo's instruction tuning: folder -> weight.
DEMO_MIX = {"vqa_open": 5, "vqa_yes_no": 4, "vqa_negated": 1.5, "vqa_emoji": 1, "vqa_flags": 0.4}


def photos(number: int, side: int = 0) -> Iterator[Sample]:
    """JPEGs with the detail of photographs: smooth shapes and some grain, 640x480 unless `side` is given."""
    random = np.random.default_rng(0)
    for i in range(number):
        size = (side, side) if side else [(640, 480), (480, 640), (800, 600)][i % 3]
        shapes = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        grain = random.normal(0, 6, (size[1], size[0], 1))
        pixels = np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=88)
        question = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": ANSWER})
        yield Sample(f"s{i:06d}", (file.getvalue(),), messages=messages)


# ---- the plain pipeline ----


def dynamic_preprocess(image: Image.Image, max_num: int = 6, image_size: int = 448) -> list[Image.Image]:
    """As users copy it: resize to the closest grid, crop each tile, the thumbnail last."""
    width, height = image.size
    ratios = sorted(
        {
            (i, j)
            for n in range(1, max_num + 1)
            for i in range(1, n + 1)
            for j in range(1, n + 1)
            if i * j <= max_num
        },
        key=lambda grid: grid[0] * grid[1],
    )
    best = min(ratios, key=lambda grid: abs(width / height - grid[0] / grid[1]))
    resized = image.resize((image_size * best[0], image_size * best[1]))
    tiles = []
    for i in range(best[0] * best[1]):
        left, top = i % best[0] * image_size, i // best[0] * image_size
        tiles.append(resized.crop((left, top, left + image_size, top + image_size)))
    return [*tiles, image.resize((image_size, image_size))] if len(tiles) > 1 else tiles


TRANSFORM = transforms.Compose(
    [
        transforms.Lambda(lambda image: image.convert("RGB") if image.mode != "RGB" else image),
        transforms.Resize((448, 448), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ]
)


class PlainPreprocess:
    """A webdataset sample -> ids, labels, tiles. own_tiles: cut by our image processor, left as uint8."""

    def __init__(self, processor: HovleProcessor, own_tiles: bool) -> None:
        self.processor, self.own_tiles = processor, own_tiles

    def __call__(self, sample: dict) -> tuple[list[int], list[int], torch.Tensor]:
        image = sample["0.jpg"]
        messages = sample["json"]["messages"]
        if self.own_tiles:
            encoded = self.processor.encode(messages, [image])
            return encoded.input_ids, encoded.labels, torch.from_numpy(encoded.tiles)
        tiles = torch.stack([TRANSFORM(tile) for tile in dynamic_preprocess(image)])
        tokenizer = self.processor.tokenizer
        context = "<img>" + "<IMG_CONTEXT>" * (self.processor.tokens_per_tile * len(tiles)) + "</img>"
        turns = [{"role": "user", "content": f"{context}\n{QUESTION}"}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(messages[1]["content"] + tokenizer.eos_token, add_special_tokens=False)[
            "input_ids"
        ]
        return ids + answer, [-100] * len(ids) + answer, tiles


def plain(folder: Path, processor: HovleProcessor, own_tiles: bool) -> Iterator[int]:
    """Samples in each batch of the plain pipeline as it comes."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=100)
        .shuffle(64)
        .decode("pil")
        .map(PlainPreprocess(processor, own_tiles))
        .repeat(4)
        .batched(16, collation_fn=list)
    )
    loader = DataLoader(dataset, batch_size=None, num_workers=WORKERS)
    for batch in loader:
        rows = plain_pack(batch)
        assert all(row[2].dtype == (torch.uint8 if own_tiles else torch.float32) for row in rows)
        yield len(batch)


def plain_pack(batch: list) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """First fit in the order of arrival, as packing examples have it."""
    rows: list[list] = []
    for sample in batch:
        fits = [r for r in rows if sum(len(s[0]) for s in r) + len(sample[0]) <= MAX_TOKENS]
        if fits:
            fits[0].append(sample)
        else:
            rows.append([sample])
    return [
        (
            torch.cat([torch.as_tensor(s[0]) for s in row]),
            torch.cat([torch.as_tensor(s[1]) for s in row]),
            torch.cat([s[2] for s in row]),
        )
        for row in rows
    ]


# ---- ours ----


def ours(folder: Path, processor: HovleProcessor, normalized: bool) -> Iterator[int]:
    """Samples in each step of RowLoader as it comes, normalized by the consumer as the model does it."""
    stream = ConversationStream(Mixture([(ShardSource(folder), 1)], 0), processor, 0, MAX_TOKENS, Ledger())
    loader = RowLoader(stream, 2, MAX_TOKENS, MAX_TILES, num_threads=WORKERS)
    with loader.iterate() as steps:
        for _, batches, _ in steps:
            for batch in batches:
                if normalized and batch.pixel_values is not None:
                    processor.image_processor.normalize(batch.pixel_values)
            yield sum(len(batch.keys) for batch in batches)


def rate(batches: Iterator[int]) -> tuple[float, float]:
    """Samples a second behind the warm-up: of the clock, and of all cores' time, which a busy machine changes less."""
    seen, start = 0, 0.0
    for number in batches:
        seen += number
        if not start and seen >= WARM_UP:
            start, cores, before = time.perf_counter(), core_seconds(), seen
        if start and seen >= before + MEASURED:
            return (seen - before) / (time.perf_counter() - start), (seen - before) / (core_seconds() - cores)
    raise AssertionError(f"only {seen} samples came")


def core_seconds() -> float:
    """What this process and its workers have computed so far."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def photo_processor(fast: bool = False) -> HovleProcessor:
    tokenizer = tiny_tokenizer([QUESTION, ANSWER])
    return HovleProcessor(HovleImageProcessor(max_tiles=6, fast=fast), tokenizer, tokens_per_tile=256)


def speed(folder: Path, rounds: int) -> dict[str, float]:
    processor, fast = photo_processor(), photo_processor(fast=True)
    write_shards(photos(SAMPLES), folder, samples_per_shard=SAMPLES // 4)
    pictures = [sample.images[0] for sample in photos(6)]
    difference = [np.abs(processor.tiles(p).astype(int) - fast.tiles(p)) for p in pictures]
    pipelines: dict[str, Callable[[], Iterator[int]]] = {
        "plain": lambda: plain(folder, processor, False),
        "ours": lambda: ours(folder, processor, True),
        "ours_fast": lambda: ours(folder, fast, True),
        "plain_same_tiles": lambda: plain(folder, processor, True),
        "ours_uint8": lambda: ours(folder, processor, False),
    }
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    of_cores: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(rounds):
        for name, pipeline in pipelines.items():
            by_clock, by_cores = rate(pipeline())
            rates[name].append(by_clock)
            of_cores[name].append(by_cores)
            print(f"{name}: {by_clock:.1f} samples/s, {by_cores:.1f} a core", file=sys.stderr, flush=True)

    def ratio(a: str, b: str, rates: dict[str, list[float]] = rates) -> float:
        return round(statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True)), 2)

    return {
        "samples_per_s": round(statistics.median(rates["ours"]), 1),
        "samples_per_s_uint8": round(statistics.median(rates["ours_uint8"]), 1),
        "samples_per_core_s_uint8": round(statistics.median(of_cores["ours_uint8"]), 1),
        "ratio": ratio("ours", "plain"),
        "ratio_of_core_time": ratio("ours", "plain", of_cores),
        "ratio_fast": ratio("ours_fast", "plain"),
        "fast_mean_difference": round(float(np.mean([d.mean() for d in difference])), 2),
        "fast_largest_difference": int(max(d.max() for d in difference)),
        "ratio_same_tiles": ratio("ours_uint8", "plain_same_tiles"),
        "ratio_same_tiles_of_core_time": ratio("ours_uint8", "plain_same_tiles", of_cores),
    }


# ---- packing, seeking, memory ----


def packing_waste(prepared: Path, steps: int = 40) -> float:
    """Share of the rows' budget that stays empty: the demo's instruction mix in rows of its recipe's 4,096 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    add_image_tokens(tokenizer)
    processor = HovleProcessor(HovleImageProcessor(56, 1, 4), tokenizer, tokens_per_tile=16)
    sources = [(ShardSource(prepared / "shards" / name), weight) for name, weight in DEMO_MIX.items()]
    stream = ConversationStream(Mixture(sources, 0), processor, 0, 4096, Ledger())
    tokens = rows = 0
    with RowLoader(stream, 1, 4096, 256, num_threads=WORKERS).iterate(0, steps) as batches:
        for _, packed, _ in batches:
            tokens += sum(batch.num_tokens for batch in packed)
            rows += len(packed)
    return 1 - tokens / (rows * 4096)


def million(folder: Path) -> Path:
    """An index of 1,000,000 samples: one tar of 1,000 under 1,000 names."""
    index = write_shards((Sample(f"t{i:04d}", text=f"number {i}") for i in range(1000)), folder / "one")
    (shard,) = index.shards
    big = folder / "million"
    big.mkdir()
    for i in range(1000):
        os.link(folder / "one" / shard.name, big / f"shard-{i:06d}.tar")
    ShardIndex(tuple(replace(shard, name=f"shard-{i:06d}.tar") for i in range(1000))).save(big)
    return big


def seek_ms(folder: Path, repeats: int = 9) -> float:
    """Open the index and read the sample at the middle position of a shuffled epoch, all from the beginning."""
    times = []
    for repeat in range(repeats):
        start = time.perf_counter()
        source = ShardSource(folder)
        Mixture([(source, 1)], repeat).read(len(source) // 2)
        times.append(1000 * (time.perf_counter() - start))
        assert len(source) == 1_000_000
    return statistics.median(times)


def memory(folder: Path, samples: int) -> dict[str, float]:
    """Growth of resident memory between a tenth of the way and the end, decoding, tiling, tokenizing and packing pairs,
    with one picture in 200 cut in half; and the most files that were open more than at the start."""
    pairs = [replace(sample, messages=None, text=QUESTION) for sample in photos(2000, side=56)]
    for i in range(0, len(pairs), 200):
        pairs[i] = replace(pairs[i], images=(pairs[i].images[0][: len(pairs[i].images[0]) // 2],))
    write_shards(pairs, folder)
    processor = HovleProcessor(HovleImageProcessor(56, 1, 1), tiny_tokenizer([QUESTION]), tokens_per_tile=4)
    ledger = Ledger(Ledger.rank_path(folder, 0), max_share=0.05)
    stream = PairStream(Mixture([(ShardSource(folder), 1)], 0), processor, 0, 1024, ledger)
    process = psutil.Process()
    seen, before, told, files, most = 0, 0, 0, process.num_fds(), 0
    with RowLoader(stream, 2, 1024, 64, num_threads=WORKERS).iterate() as steps:
        for _, batches, _ in steps:
            seen += sum(len(batch.keys) for batch in batches)
            most = max(most, process.num_fds())
            if seen >= told:
                print(f"{seen} samples: {process.memory_info().rss >> 20} MiB", file=sys.stderr, flush=True)
                told += samples // 10
            if not before and seen >= samples // 10:
                gc.collect()
                before = process.memory_info().rss
            if seen >= samples:
                break
    gc.collect()
    growth = (process.memory_info().rss - before) / 2**20
    return {"memory_growth_mib": round(growth, 1), "most_open_files": most - files}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prepared", type=Path, help="the demo's prepared data (default: it is prepared anew)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the speed part")
    parser.add_argument("--memory-samples", type=int, default=100_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {"benchmark": "data"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "speed" in args.parts:
            result |= speed(folder / "photos", args.rounds)
        if "packing" in args.parts:
            prepared = args.prepared or Path("runs/demo/prepared")
            if not prepared.exists():
                from hovle_demo.prepare import prepare

                prepared = folder / "prepared"
                prepare(prepared)
            result["packing_waste"] = round(packing_waste(prepared), 4)
        if "seek" in args.parts:
            result["seek_ms"] = round(seek_ms(million(folder)), 1)
        if "memory" in args.parts:
            result |= memory(folder / "small", args.memory_samples)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

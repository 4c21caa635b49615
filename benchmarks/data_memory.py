"""Memory and open files over 100,000 samples: decode, tile, tokenize, pack, with the loader's threads running.

    python benchmarks/data_memory.py [--samples 100000] [--rows]

Ends with one JSON line: resident memory a tenth of the way in and at the end, and the most files open at once.
"""

import argparse
import gc
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from hovle_core.image_processor import HovleImageProcessor
from hovle_core.processor import HovleProcessor
from hovle_core.testing import tiny_tokenizer
from hovle_data import Ledger, Mixture, PairStream, RowLoader, Sample, ShardSource, StepLoader, write_shards


def write(folder: Path, number: int) -> None:
    """A shard folder of `number` pairs; one in 200 is a picture cut in half."""
    generator = np.random.default_rng(0)

    def samples():
        for i in range(number):
            out = io.BytesIO()
            pixels = generator.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).resize((56, 56)).save(out, "JPEG")
            data = out.getvalue()
            yield Sample(
                f"s{i:06d}", (data[: len(data) // 2] if i % 200 == 0 else data,), f"number {i} is red"
            )

    write_shards(samples(), folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rows", action="store_true", help="steps of full rows instead of samples")
    args = parser.parse_args()
    processor = HovleProcessor(
        HovleImageProcessor(tile_size=56, max_tiles=1), tiny_tokenizer(["number is red"]), tokens_per_tile=4
    )
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "pairs", 2_000)
        ledger = Ledger(Ledger.rank_path(folder, 0), max_share=0.05)
        stream = PairStream(Mixture([(ShardSource(folder / "pairs"), 1)], 0), processor, 0, 512, ledger)
        loader = (
            RowLoader(stream, 4, 512, 64, num_threads=2)
            if args.rows
            else StepLoader(stream, 64, 512, 64, num_threads=2)
        )
        seen, files, resident = 0, process.num_fds(), {}
        with loader.iterate() as steps:
            for _, batches, _ in steps:
                seen += sum(len(batch.keys) for batch in batches)
                files = max(files, process.num_fds())
                for share in (0.1, 0.5):
                    if seen >= share * args.samples and share not in resident:
                        gc.collect()
                        resident[share] = process.memory_info().rss
                if seen >= args.samples:
                    break
        gc.collect()
        resident[1.0] = process.memory_info().rss
        mib = {share: round(value / 2**20, 1) for share, value in resident.items()}
        print(
            json.dumps(
                {
                    "benchmark": "data_memory",
                    "steps_of": "rows" if args.rows else "samples",
                    "samples": seen,
                    "quarantined": ledger.num_bad,
                    "mib_at_10_percent": mib[0.1],
                    "mib_at_50_percent": mib[0.5],
                    "mib_at_the_end": mib[1.0],
                    "growth_mib": round(mib[1.0] - mib[0.1], 1),
                    "most_open_files": files,
                    "open_files_at_the_end": process.num_fds(),
                    "threads_at_the_end": len(os.listdir("/proc/self/task"))
                    if os.path.isdir("/proc")
                    else None,
                }
            )
        )


if __name__ == "__main__":
    main()

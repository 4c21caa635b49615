"""What docs/data.md works out the paper's scale with: bytes of a sample, and one process that builds and validates.

    python benchmarks/data_scale.py [--rounds 3]

On the pictures of benchmarks/data.py, which says how many samples a second become packed rows. These are rates of this
machine at this time, no ratios: the page calls them a floor.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from data import SAMPLES, photo_processor, photos
from safetensors.numpy import load_file

from hovle_data import ShardSource, write_shards
from hovle_data.build import build
from hovle_data.spec import BuildSpec, SourceSpec
from hovle_data.validate import validate


def sizes_and_builds(photos_folder: Path, folder: Path, rounds: int) -> dict[str, float]:
    """Bytes of a sample, and samples a second of one process that builds and that validates."""
    folder.mkdir()
    photo_processor().save_pretrained(folder / "processor")
    given = [SourceSpec(path=str(photos_folder), name="webdataset")]
    specs = {
        "build_per_s": BuildSpec(sources=given),
        "build_with_processor_per_s": BuildSpec(sources=given, processor=str(folder / "processor")),
    }
    source = ShardSource(photos_folder)
    rates: dict[str, list[float]] = {**{name: [] for name in specs}, "validate_per_s": []}
    for number in range(rounds):
        for name, spec in specs.items():
            start = time.perf_counter()
            index = build(spec, [source], folder / f"{name}-{number}")
            rates[name].append(SAMPLES / (time.perf_counter() - start))
        start = time.perf_counter()
        assert not validate([source]).problems
        rates["validate_per_s"].append(SAMPLES / (time.perf_counter() - start))
    arrays = load_file(folder / "build_per_s-0" / "index.safetensors")
    return {
        "bytes_per_sample": round(index.size / SAMPLES),
        "index_bytes_per_sample": round(sum(array.nbytes for array in arrays.values()) / SAMPLES),
        **{name: round(statistics.median(values), 1) for name, values in rates.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(photos(SAMPLES), folder / "photos", samples_per_shard=SAMPLES // 4)
        found = sizes_and_builds(folder / "photos", folder / "built", args.rounds)
    print(json.dumps({"benchmark": "data_scale", **found}))


if __name__ == "__main__":
    main()

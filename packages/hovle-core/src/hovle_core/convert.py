"""Checkpoint folders between the released format and ours, tensor for tensor; both ways and back, no bit is changed.

Shards stay what they were, and a tensor is mapped from disk rather than read, so the memory that a conversion needs
beyond the page cache is the q, k and v of one shard. What appears at the destination is whole: it is written beside it
and renamed.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging

from hovle_core.config import HovleConfig
from hovle_core.image_processor import HovleImageProcessor
from hovle_core.official import config_to_released, is_released, json_object, llm_kind, read_released_config
from hovle_core.official_processor import TOKENIZER_FILES, has_tokenizer, processor_from_released
from hovle_core.official_tensors import Entry, check_ours, check_released, layout
from hovle_core.processor import HovleProcessor
from hovle_core.tensor_files import SAFETENSORS, SAFETENSORS_INDEX, TensorFiles

logger = logging.get_logger(__name__)

Format = Literal["released", "hovle"]

# Beside a converted checkpoint of ours: the small files of the one it comes from, for the way back.
KEPT = "released"
GENERATION_CONFIG, PREPROCESSOR_CONFIG = "generation_config.json", "preprocessor_config.json"


@dataclass(frozen=True)
class Plan:
    """What a conversion will write, checked: every tensor is there and has the shape that the config asks for."""

    source: Path
    to: Format
    config: HovleConfig
    # File name at the destination -> its tensors.
    shards: dict[str, list[Entry]]
    # Bytes of tensors in each.
    sizes: dict[str, int]
    has_tokenizer: bool

    def targets(self, entry: Entry) -> tuple[str, ...]:
        return entry.ours if self.to == "hovle" else (entry.released,)

    def lines(self) -> list[str]:
        """The plan for people, a line for each thing that will be written."""
        kind = llm_kind(self.config)
        llm = self.config.text_config.model_type
        ends = (kind, llm) if self.to == "hovle" else (llm, kind)
        lines = [f"config.json: {'ours' if self.to == 'hovle' else 'released'}, LLM {ends[0]} -> {ends[1]}"]
        for name, entries in self.shards.items():
            count = sum(len(self.targets(entry)) for entry in entries)
            lines.append(f"{name}: {count} tensors, {self.sizes[name] / 2**20:,.1f} MiB")
        lines.append("tokenizer and processor" if self.has_tokenizer else "no tokenizer: the source has none")
        return lines


def format_of(folder: Path) -> Format:
    """The format of a checkpoint folder. Raises ValueError for another model, FileNotFoundError for no config.json."""
    if is_released(folder):
        return "released"
    kind = json_object(folder / "config.json").get("model_type")
    if kind != HovleConfig.model_type:
        raise ValueError(
            f"{folder}/config.json: model_type {kind!r} with no embedding_config of a released HoVLE; convert takes "
            "a HoVLE in the released format or in ours"
        )
    return "hovle"


def plan(source: Path, to: Format) -> Plan:
    """Read and check the source; nothing is written. Raises ValueError or FileNotFoundError naming what is wrong."""
    if format_of(source) == to:
        raise ValueError(f"{source} is in the {to} format already")
    config = read_released_config(source) if to == "hovle" else HovleConfig.from_pretrained(source)
    entries = layout(config)
    with TensorFiles(source) as tensors:
        (check_released if to == "hovle" else check_ours)(entries, tensors.shapes, source)
        files = {name: _shard_name(i, len(tensors.names)) for i, name in enumerate(tensors.names)}
        shards: dict[str, list[Entry]] = {name: [] for name in files.values()}
        sizes = dict.fromkeys(shards, 0)
        for entry in entries:
            sources = (entry.released,) if to == "hovle" else entry.ours
            if entry.optional and sources[0] not in tensors.shapes:
                continue
            # q, k and v may lie in two shards of ours: the first one decides.
            shard = files[tensors.file_of[sources[0]]]
            shards[shard].append(entry)
            sizes[shard] += sum(tensors[name].nbytes for name in sources)
    shards = {name: entries for name, entries in shards.items() if entries}
    return Plan(source, to, config, shards, sizes, has_tokenizer(source))


def _shard_name(index: int, count: int) -> str:
    return SAFETENSORS if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def convert(plan: Plan, destination: Path, force: bool = False) -> None:
    """Write what `plan` says to `destination`, with a progress bar, whole or not at all.

    Raises ValueError if `destination` is not empty and `force` is not given, or is no checkpoint that may be replaced.
    """
    check_destination(plan.source, destination, force)
    with _replacing(destination) as folder:
        # Small files first: what cannot be converted is found before gigabytes are written.
        (_write_hovle_files if plan.to == "hovle" else _write_released_files)(plan, folder)
        _write_weights(plan, folder)


def check_destination(source: Path, destination: Path, force: bool) -> None:
    """Raise ValueError unless `destination` may be written."""
    if source.resolve().is_relative_to(destination.resolve()):
        raise ValueError(f"{destination} holds the source {source}; choose another folder")
    if files := [path for path in (destination, *destination.parents) if path.is_file()]:
        raise ValueError(f"{files[0]} is a file; give a folder")
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    if not force:
        raise ValueError(f"{destination} is not empty: choose another folder, or pass --force to replace it")
    if not (destination / "config.json").is_file():
        raise ValueError(f"{destination} is no checkpoint (no config.json): --force does not replace it")


@contextmanager
def _replacing(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` that takes its place when all went well, and is gone otherwise."""
    destination = destination.resolve()
    temporary = destination.with_name(f".{destination.name}-{os.getpid()}")
    old = temporary.with_name(f"{temporary.name}.old")
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    if destination.exists():
        destination.rename(old)
    temporary.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def _write_weights(plan: Plan, folder: Path) -> None:
    weight_map: dict[str, str] = {}
    bar = logging.tqdm(total=sum(plan.sizes.values()), unit="B", unit_scale=True, desc="weights")
    with TensorFiles(plan.source) as tensors, bar:
        for shard, entries in plan.shards.items():
            written = _convert_shard(plan, entries, tensors)
            save_file(written, folder / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(written, shard)
            bar.update(plan.sizes[shard])
    if len(plan.shards) > 1:
        index = {
            "metadata": {"total_size": sum(plan.sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(folder / SAFETENSORS_INDEX, index)


def _convert_shard(plan: Plan, entries: list[Entry], tensors: TensorFiles) -> dict[str, Tensor]:
    written: dict[str, Tensor] = {}
    for entry in entries:
        if plan.to == "hovle":
            written |= entry.split(tensors[entry.released])
        else:
            written |= entry.join([tensors[name] for name in entry.ours])
    return written


def _write_hovle_files(plan: Plan, folder: Path) -> None:
    config = plan.config
    config.architectures = ["HovleForConditionalGeneration"]
    config.save_pretrained(folder)
    processor = processor_from_released(plan.source) if plan.has_tokenizer else None
    if processor is not None:
        processor.save_pretrained(folder)
    _released_generation(plan.source, config, processor).save_pretrained(folder)
    (folder / KEPT).mkdir()
    for name in (*TOKENIZER_FILES, PREPROCESSOR_CONFIG, GENERATION_CONFIG):
        _copy(plan.source / name, folder / KEPT / name)


def _write_released_files(plan: Plan, folder: Path) -> None:
    image_processor = None
    if plan.has_tokenizer:
        image_processor = HovleProcessor.from_pretrained(plan.source).image_processor
    _write_json(folder / "config.json", config_to_released(plan.config, image_processor))
    if (plan.source / KEPT).is_dir():
        shutil.copytree(plan.source / KEPT, folder, dirs_exist_ok=True)
        return
    if image_processor is not None:
        _write_json(folder / PREPROCESSOR_CONFIG, _preprocessor_config(image_processor))
    for name in TOKENIZER_FILES:
        _copy(plan.source / name, folder / name)
    generation = _generation_config(plan.source)
    generation.suppress_tokens = None
    generation.save_pretrained(folder)


def generation_from_released(folder: Path, config: HovleConfig) -> GenerationConfig:
    """The generation config of a released folder as a conversion writes it, of a model with this `config`.

    A tokenizer that is there and cannot be read is told in the log: the weights do not need it.
    """
    processor = None
    if has_tokenizer(folder):
        try:
            processor = processor_from_released(folder)
        except Exception as error:  # whatever it is, HovleProcessor.from_pretrained raises it
            logger.warning(f"{folder}: end tokens are config.json's alone, for want of a tokenizer: {error}")
    return _released_generation(folder, config, processor)


def _released_generation(
    source: Path, config: HovleConfig, processor: HovleProcessor | None
) -> GenerationConfig:
    """`generation_config.json` and what the LLM's config adds; the processor's tokenizer says what ends an answer."""
    generation, llm = _generation_config(source), config.text_config
    ends = llm.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
    ends = list(ends) if isinstance(ends, list) else [ends]
    if processor is not None:
        ends.append(processor.tokenizer.eos_token_id)
    generation.eos_token_id = sorted({end for end in ends if end is not None}) or None
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(generation, name) is None:
            setattr(generation, name, getattr(llm, name))
    generation.suppress_tokens = [config.image_token_id]
    return generation


def _generation_config(source: Path) -> GenerationConfig:
    if not (path := source / GENERATION_CONFIG).is_file():
        return GenerationConfig()
    return GenerationConfig.from_dict(json_object(path))


def _preprocessor_config(image_processor: HovleImageProcessor) -> dict[str, object]:
    """One tile as the released repositories describe it: a CLIP image processor without cropping."""
    size = image_processor.tile_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": image_processor.image_mean,
        "image_std": image_processor.image_std,
        "resample": 3,
        "size": size,
    }


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copyfile(source, target)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

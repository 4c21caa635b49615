"""The demo's table: what the finished model sees, and what it does not, with blind and shuffled controls.

Blind baselines are counted on the very questions asked: the best answer that a question's text alone allows.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from hovle_core.attention import PACKED_ATTENTION
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.precision import resolve_precision
from hovle_core.processor import Encoded, HovleProcessor
from hovle_core.registry import Registry
from hovle_data.decode import TileCache
from hovle_data.schema import Message, Sample
from hovle_data.shards import ShardSource
from hovle_demo.questions import DESCRIBE_QUESTION, NAME_QUESTIONS
from hovle_demo.report import Example, Row
from hovle_train import evaluate as metrics
from hovle_train.stages.distillation_options import DistillationOptions
from hovle_train.teachers import build_teacher

Progress = Callable[[str, int, int], None]

NUM_YES_NO = 1500  # of the 7,136 yes/no test questions, a seeded sample
NUM_SHUFFLED = 1000  # of the questions, again with shuffled pictures: a control needs no more
TILE_CACHE = 2**29  # bytes: every picture is asked about more than once
NUM_EXAMPLES = 24
STAGES = ("distillation", "alignment", "instruction_tuning")


@dataclass
class Evaluation:
    """Rows of the table, the numbers by key for results.json, and pictures to show."""

    rows: list[Row] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)

    def add(
        self, key: str, group: str, name: str, value: float, unit: str, count: int, baseline: str = ""
    ) -> None:
        self.rows.append(Row(group, name, value, unit, baseline, count))
        self.numbers[key] = round(value, 4)


@dataclass
class Models:
    """A finished run's model with its processor, in eval, attending and computing as in training."""

    model: HovleForConditionalGeneration
    processor: HovleProcessor
    cut_tiles: TileCache

    @classmethod
    def load(cls, checkpoint: Path) -> "Models":
        dtype = resolve_precision("auto", torch.device("cpu"))
        model = HovleForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).eval()
        model.set_attn_implementation(PACKED_ATTENTION)
        processor = HovleProcessor.from_pretrained(checkpoint)
        return cls(model, processor, TileCache(processor, TILE_CACHE))

    def tiles(self, sample: Sample) -> list[np.ndarray]:
        """Of each picture, uint8 `[N, S, S, 3]`."""
        return [self.cut_tiles(image) for image in sample.images]


def evaluate(
    runs: Path,
    shards: Path,
    llm: Path,
    distillation: dict[str, Any],
    registry: Registry,
    seed: int,
    progress: Progress,
) -> Evaluation:
    """Score the stages in `runs` (folders with `final/`) on the test sets in `shards`.

    `distillation` are the options of that stage, which name the teacher or teachers.
    """
    result = Evaluation()
    finished = {stage: Models.load(runs / stage / "final") for stage in STAGES}
    last = finished["instruction_tuning"]
    result.numbers["parameters"] = last.model.num_parameters()
    result.numbers["parameters_embedding"] = sum(p.numel() for p in last.model.embedding.parameters())
    _easy_vqa(result, last, shards, seed, progress)
    _emoji(result, last, shards, progress)
    _flags(result, last, shards, seed)
    _teachers(
        result, finished["distillation"], runs / "distillation" / "final", shards, distillation, registry
    )
    _language(result, finished, llm, shards)
    return result


def _shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Each sample with another one's picture: questions of one picture are moved together, to a different picture."""
    by_picture: dict[Any, list[int]] = {}
    for i, sample in enumerate(samples):
        by_picture.setdefault(sample.images[0], []).append(i)
    pictures = list(by_picture)
    random.Random(seed).shuffle(pictures)
    moved = dict(zip(pictures, pictures[1:] + pictures[:1], strict=True))
    return [
        Sample(sample.key, (moved[sample.images[0]],), sample.text, sample.messages, sample.meta)
        for sample in samples
    ]


def _some(samples: Sequence[Sample], seed: int) -> list[Sample]:
    return random.Random(seed).sample(samples, min(NUM_SHUFFLED, len(samples)))


def _heldout_texts(shards: Path) -> list[str]:
    """The held-out prose: every sample of that set is a text."""
    return [cast(str, sample.text) for sample in ShardSource(shards / "text_heldout")]


def _prompts(models: Models, samples: Sequence[Sample]) -> list[Encoded]:
    """The questions of easy-VQA, whose samples are conversations."""
    return [
        models.processor.encode(
            cast(tuple[Message, ...], sample.messages)[:1], models.tiles(sample), add_generation_prompt=True
        )
        for sample in samples
    ]


def accuracy(given: Sequence[str], samples: Sequence[Sample]) -> float:
    """Share of answers that are the true one, letter case aside."""
    hits = [
        answer.casefold() == sample.meta["answer"].casefold()
        for answer, sample in zip(given, samples, strict=True)
    ]
    return sum(hits) / len(hits)


def blind_accuracy(samples: Sequence[Sample]) -> float:
    """What the question alone allows at best: for each question text, its commonest answer among these samples."""
    by_question: dict[str, Counter[str]] = {}
    for sample in samples:
        by_question.setdefault(sample.meta["question"], Counter())[sample.meta["answer"]] += 1
    return sum(max(answers.values()) for answers in by_question.values()) / len(samples)


def _easy_vqa(result: Evaluation, models: Models, shards: Path, seed: int, progress: Progress) -> None:
    sets = {
        "open": list(ShardSource(shards / "vqa_test_open")),
        "yes_no": list(ShardSource(shards / "vqa_test_yes_no")),
    }
    sets["yes_no"] = random.Random(seed).sample(sets["yes_no"], min(NUM_YES_NO, len(sets["yes_no"])))
    for kind, samples in sets.items():
        name = "open questions" if kind == "open" else "yes/no questions"
        baseline = f"blind {blind_accuracy(samples):.3f}"
        result.numbers[f"easy_vqa_{kind}_blind"] = round(blind_accuracy(samples), 4)
        for key, picture, asked in (
            (f"easy_vqa_{kind}", "right picture", samples),
            (f"easy_vqa_{kind}_shuffled", "shuffled pictures", _some(_shuffled(samples, seed), seed)),
        ):
            label = f"easy-VQA {name}, {picture}"
            given = metrics.answers(
                models.model,
                models.processor,
                _prompts(models, asked),
                progress=partial(progress, label),
            )
            result.add(
                key,
                "easy-VQA",
                f"{name}, {picture}",
                accuracy(given, asked),
                "accuracy",
                len(asked),
                baseline,
            )
            if picture == "right picture":
                _show(result, f"easy-VQA {name}", asked, given, seed)
                result.numbers[f"{key}_by_answer"] = _by_answer(given, asked)


def _show(result: Evaluation, group: str, samples: Sequence[Sample], given: Sequence[str], seed: int) -> None:
    for i in random.Random(seed).sample(range(len(samples)), min(NUM_EXAMPLES // 3, len(samples))):
        meta = samples[i].meta
        result.examples.append(
            Example(samples[i].images[0], meta["question"], given[i], meta["answer"], group)
        )


def _by_answer(given: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """Accuracy for each true answer: where a model that guesses gives itself away."""
    by_answer: dict[str, list[bool]] = {}
    for answer, sample in zip(given, samples, strict=True):
        truth = sample.meta["answer"]
        by_answer.setdefault(truth, []).append(answer.casefold() == truth.casefold())
    return {truth: round(sum(hits) / len(hits), 3) for truth, hits in sorted(by_answer.items())}


def _ask(models: Models, sample: Sample, question: str, answer: str | None = None) -> Encoded:
    """A question about a sample's picture, with its answer as target or open for generation."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return models.processor.encode(messages, models.tiles(sample), add_generation_prompt=answer is None)


def _emoji(result: Evaluation, models: Models, shards: Path, progress: Progress) -> None:
    """Unseen concepts: is the true name likelier a token than nine others? With the picture of another as control."""
    samples = list(ShardSource(shards / "emoji_test"))
    for key, name, asked in (
        ("emoji_ranking", "unseen concepts, true name among 10", samples),
        ("emoji_ranking_shuffled", "the same with shuffled pictures", _shuffled(samples, 0)),
    ):
        names = [[sample.meta["name"], *sample.meta["distractors"]] for sample in asked]
        candidates = [
            _ask(models, sample, NAME_QUESTIONS[0], candidate)
            for sample, group in zip(asked, names, strict=True)
            for candidate in group
        ]
        losses = iter(
            metrics.target_losses(
                models.model, models.processor, candidates, partial(progress, f"emoji, {name}")
            )
        )
        ranks = [metrics.rank_of_first([next(losses) for _ in group]) for group in names]
        hits = sum(rank == 0 for rank in ranks) / len(ranks)
        result.add(key, "Emoji", name, hits, "accuracy", len(ranks), "chance 0.10")
    shown = random.Random(0).sample(samples, min(NUM_EXAMPLES // 3, len(samples)))
    prompts = [_ask(models, sample, NAME_QUESTIONS[0]) for sample in shown]
    for sample, answer in zip(shown, metrics.answers(models.model, models.processor, prompts), strict=True):
        result.examples.append(
            Example(sample.images[0], NAME_QUESTIONS[0], answer, sample.meta["name"], "unseen emoji concepts")
        )


def _flags(result: Evaluation, models: Models, shards: Path, seed: int) -> None:
    """How well held-out flags' descriptions are foreseen, with the right flag and with another one."""
    samples = list(ShardSource(shards / "captions_flags_test"))
    for key, name, asked in (
        ("flag_caption_loss", "held-out descriptions, right flag", samples),
        ("flag_caption_loss_shuffled", "held-out descriptions, shuffled flags", _shuffled(samples, seed)),
    ):
        encoded = [_ask(models, sample, DESCRIBE_QUESTION, sample.text) for sample in asked]
        losses = metrics.target_losses(models.model, models.processor, encoded)
        mean = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
        result.add(key, "Flags", name, mean, "nats a token", len(asked))


def _teachers(
    result: Evaluation, models: Models, checkpoint: Path, shards: Path, options: dict, registry: Registry
) -> None:
    """After distillation, on pictures and prose that no stage has seen."""
    teachers = DistillationOptions.model_validate(options).all_teachers
    encoder = build_teacher(teachers, registry, models.processor.tokens_per_tile)
    pictures = [*ShardSource(shards / "emoji_test")]
    seen: dict[bytes, None] = {sample.images[0]: None for sample in ShardSource(shards / "vqa_test_open")}
    unique = [sample.images[0] for sample in pictures] + list(seen)[:500]
    tiles = np.concatenate([models.cut_tiles(image) for image in unique])
    cosine = metrics.image_cosine(models.model, models.processor, encoder, checkpoint, tiles)
    result.add(
        "image_cosine", "Teachers", "unseen pictures to the vision teacher", cosine, "cosine", len(unique)
    )
    texts = _heldout_texts(shards)[:200]
    cosine = metrics.text_cosine(models.model, models.processor, texts)
    result.add("text_cosine", "Teachers", "unseen prose to the LLM's embedding", cosine, "cosine", len(texts))


def _language(result: Evaluation, finished: dict[str, Models], llm: Path, shards: Path) -> None:
    """Does the LLM keep its language? Perplexity on prose about countries that no stage has read."""
    texts = _heldout_texts(shards)[::4]
    plain = AutoModelForCausalLM.from_pretrained(
        llm, dtype=finished["distillation"].model.dtype, attn_implementation=PACKED_ATTENTION
    )
    any_processor = finished["distillation"].processor
    value = metrics.perplexity(plain, any_processor, texts)
    result.add(
        "perplexity_llm", "Language", "held-out countries' prose, plain LLM", value, "perplexity", len(texts)
    )
    for stage, models in finished.items():
        value = metrics.perplexity(models.model, models.processor, texts)
        name = f"the same, HoVLE after {stage.replace('_', ' ')}"
        result.add(f"perplexity_{stage}", "Language", name, value, "perplexity", len(texts))

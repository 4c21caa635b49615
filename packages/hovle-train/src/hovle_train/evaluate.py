"""What evaluations are made of: answers, losses of given targets, perplexity, and cosines to the teachers.

Everything is greedy, deterministic and in eval, through the same processor as training.
Shapes: T packed tokens, K targets, N tiles.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from hovle_core.losses import IGNORE_INDEX
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.precision import resolve_precision
from hovle_core.processor import Encoded, HovleProcessor
from hovle_core.roles import TeacherEncoder
from hovle_data.packing import PackedBatch, pack
from hovle_train.features import to_student_grid
from hovle_train.stages.base import model_inputs
from hovle_train.stages.distillation import HEAD_FILE
from hovle_train.teachers import JoinedHeads, load_heads, widths

Progress = Callable[[int, int], None]
MAX_TOKENS = 4096


@contextmanager
def evaluating(model: nn.Module, precision: str = "auto") -> Iterator[None]:
    """No gradients, eval mode, and autocast where it is fast."""
    device = _device(model)
    dtype = resolve_precision(precision, device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            yield
    finally:
        model.train(was_training)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def target_losses(
    model: nn.Module, processor: HovleProcessor, samples: Sequence[Encoded], progress: Progress | None = None
) -> list[tuple[float, int]]:
    """(summed negative log likelihood in nats, number of targets) of each sample, in order.

    `model` is a HoVLE, or the bare LLM for samples without pictures.
    """
    named = [Encoded(s.input_ids, s.labels, s.tiles, key=str(i)) for i, s in enumerate(samples)]
    results: list[tuple[float, int]] = [(0.0, 0)] * len(samples)
    done = 0
    with evaluating(model):
        longest = max((len(sample.input_ids) for sample in named), default=0)
        for packed in pack(named, max(MAX_TOKENS, longest), max_tiles=512):
            batch = packed.to(_device(model))
            keep = (batch.labels[0, 1:] != IGNORE_INDEX).nonzero()[:, 0]
            logits = model(**_inputs(model, batch, processor), logits_to_keep=keep, use_cache=False).logits[0]
            losses = F.cross_entropy(logits.float(), batch.labels[0, 1:][keep], reduction="none")  # [K]
            sample_of = torch.arange(len(batch.keys)).repeat_interleave(torch.tensor(batch.sample_lengths))
            owner = sample_of[keep.cpu() + 1]
            sums = torch.zeros(len(batch.keys)).index_add(0, owner, losses.cpu())
            counts = torch.bincount(owner, minlength=len(batch.keys))
            for key, total, count in zip(batch.keys, sums.tolist(), counts.tolist(), strict=True):
                results[int(key)] = (total, count)
            done += len(batch.keys)
            if progress is not None:
                progress(done, len(samples))
    return results


def _inputs(model: nn.Module, batch: PackedBatch, processor: HovleProcessor) -> dict[str, Any]:
    if isinstance(model, HovleForConditionalGeneration):
        return model_inputs(batch, processor)
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids}


def perplexity(
    model: nn.Module, processor: HovleProcessor, texts: Sequence[str], max_tokens: int = 512
) -> float:
    """exp of the mean loss a token over plain texts; each is read from its start, at most `max_tokens` of it."""
    samples = [processor.encode_text(text) for text in texts]
    cut = [Encoded(s.input_ids[:max_tokens], s.labels[:max_tokens], s.tiles) for s in samples]
    losses = target_losses(model, processor, cut)
    return math.exp(sum(loss for loss, _ in losses) / sum(count for _, count in losses))


def answers(
    model: HovleForConditionalGeneration,
    processor: HovleProcessor,
    prompts: Sequence[Encoded],
    max_new_tokens: int = 8,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy answers to prompts (encoded with `add_generation_prompt`), in order; alike lengths share a batch."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    results = [""] * len(prompts)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = processor.batch([prompts[i] for i in rows], _device(model))
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(
                rows, processor.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                results[i] = text.strip()
            if progress is not None:
                progress(start + len(rows), len(prompts))
    return results


def rank_of_first(losses: Sequence[tuple[float, int]]) -> int:
    """How many candidates are as likely a token as the first, which is the true one, or likelier: 0 is a hit."""
    means = [loss / count for loss, count in losses]
    if not all(map(math.isfinite, means)):
        raise ValueError(f"losses are not finite: {means}")
    return sum(mean <= means[0] for mean in means[1:])


def image_cosine(
    model: HovleForConditionalGeneration,
    processor: HovleProcessor,
    teacher: TeacherEncoder,
    checkpoint: Path,
    tiles: np.ndarray,
    batch_size: int = 64,
) -> float:
    """Mean cosine of the distillation head's output to the teacher's centred features, over tiles `[N, S, S, 3]`;
    of joined teachers (`hovle_train.teachers`) the mean over teachers.

    `checkpoint` is the folder of a finished distillation, whose head and feature mean are used.
    """
    head, mean = load_head(checkpoint)
    head, mean = head.to(_device(model)), mean.to(_device(model))
    sizes = widths(teacher) if isinstance(head, JoinedHeads) else [len(mean)]
    total, count = 0.0, 0
    with evaluating(model):
        for start in range(0, len(tiles), batch_size):
            some = tiles[start : start + batch_size]
            pixels = torch.from_numpy(some).permute(0, 3, 1, 2).to(_device(model))
            one = processor.encode_image(some[:1]).input_ids
            ids = torch.from_numpy(one).repeat(len(some), 1).to(_device(model))
            embedded = model.embed(ids, processor.image_processor.normalize(pixels))
            student = head(embedded[ids == model.config.image_token_id].float())
            teacher = teacher.to(_device(model))
            features = teacher.connected_features if isinstance(head, nn.Identity) else teacher.features
            target = to_student_grid(features(pixels), processor.tokens_per_tile).flatten(0, 1)
            target = target[:, -len(mean) :] - mean  # of joined layers, the one that the output learnt
            for x, z in zip(student.float().split(sizes, -1), target.split(sizes, -1), strict=True):
                total += float(F.cosine_similarity(x, z, dim=-1).sum())
                count += len(z)
    return total / count


def text_cosine(
    model: HovleForConditionalGeneration, processor: HovleProcessor, texts: Sequence[str]
) -> float:
    """Mean cosine of the holistic embedding's output to the LLM's own embedding over the tokens of texts."""
    total, count = 0.0, 0
    with evaluating(model):
        for packed in pack([processor.encode_text(text) for text in texts], MAX_TOKENS, max_tiles=1):
            batch = packed.to(_device(model))
            embedded = model.embed(**model_inputs(batch, processor))
            target = model.language_model.get_input_embeddings()(batch.input_ids)
            total += float(F.cosine_similarity(embedded.float(), target.float(), dim=-1).sum())
            count += batch.input_ids.numel()
    return total / count


def load_head(checkpoint: Path) -> tuple[nn.Module, Tensor]:
    """The distillation head of a finished run and the feature mean. Raises FileNotFoundError where there is none."""
    tensors = load_file(checkpoint / HEAD_FILE)
    mean = tensors.pop("mean")
    head = load_heads({name.removeprefix("head."): tensor for name, tensor in tensors.items()}, _one_head)
    return head.eval(), mean


def _one_head(weights: dict[str, Tensor]) -> nn.Module:
    if not weights:  # the teacher's connector took its place
        head: nn.Module = nn.Identity()
    elif "weight" in weights:
        head = nn.Linear(*weights["weight"].shape[::-1])
    else:
        first, last = weights["0.weight"], weights["2.weight"]
        head = nn.Sequential(nn.Linear(*first.shape[::-1]), nn.GELU(), nn.Linear(*last.shape[::-1]))
    head.load_state_dict(weights)
    return head

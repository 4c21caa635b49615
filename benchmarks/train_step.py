"""A training step: useful tokens/s packed against padded, and the share of this machine's matmul peak that it gets.

Packed against padded: whole steps (forward, backward, float32 masters, Muon and AdamW) of the demo's model on 64
samples each, with lengths drawn from those of the demo's alignment and instruction tuning recipes. Padded is what a
plain collator gives: rows padded to the longest, an attention_mask, SDPA. Both use our model, loss and weights.

Share of peak: forward and backward of the 2.6B model's shapes cut to 2 embedding blocks and 2 LLM layers, on a packed
row of 4,096 tokens. Operations are those of the matmuls that the step needs (2 a weight and token forward, 4 backward;
the head at targets only; causal attention counted half); the peak is the rate that plain matmuls keep up for three
seconds before and after each step, and the share the mean of two steps. Both compute in bfloat16 where the CPU is fast
at it, as training does, and in float32 elsewhere; `dtype` says which.
"""

import json
import random
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from hovle_core import HovleForConditionalGeneration
from hovle_core.attention import PACKED_ATTENTION
from hovle_core.config import HolisticEmbeddingConfig
from hovle_core.losses import next_token_loss
from hovle_core.precision import has_fast_bfloat16
from hovle_train.optim import build_optimizers
from hovle_train.recipe_sections import OptimConfig
from hovle_train.weights import Weights

# How many of the first 512 samples of each recipe have so many tokens; 16 tokens of each are its picture. In both, all
# but that picture, the template and the question are targets.
ALIGNMENT = {
    21: 2, 22: 11, 23: 386, 24: 28, 25: 20, 26: 21, 27: 15, 28: 10, 29: 1, 32: 1, 35: 1, 52: 2, 56: 1, 57: 1, 58: 1,
    62: 1, 78: 1, 83: 2, 84: 2, 95: 1, 102: 1, 104: 1, 114: 1, 193: 1,
}  # fmt: skip
INSTRUCTION_TUNING = {
    37: 1, 38: 21, 39: 69, 40: 51, 41: 22, 42: 128, 43: 60, 44: 100, 45: 46, 46: 4, 47: 3, 48: 1, 49: 2, 59: 1, 73: 1,
    94: 1, 114: 1,
}  # fmt: skip
NOT_TARGETS = {"alignment": 19, "instruction_tuning": 39}
# (tokens, targets) of the large model's packed row; 256 tokens of each are a picture.
LARGE = [(512, 128)] * 8
DEVICE = torch.device("cpu")
DTYPE = torch.bfloat16 if has_fast_bfloat16(DEVICE) else torch.float32
SMALL_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
LARGE_SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
SAMPLES, STEPS, LARGE_STEPS = 64, 6, 2

Inputs = tuple[dict[str, Tensor | None], Tensor]


def build(sizes: dict[str, int], vocab: int, layers: int, image_size: int) -> HovleForConditionalGeneration:
    tied = vocab < 10_000  # as the demo's LLM and the released one have it
    llm = LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab, num_hidden_layers=layers, tie_word_embeddings=tied, **sizes)
    )
    embedding = HolisticEmbeddingConfig(
        vocab_size=vocab, num_hidden_layers=layers, image_size=image_size, **sizes
    )
    model = HovleForConditionalGeneration.from_language_model(llm, embedding, image_token_id=1)
    if not tied:
        model.language_model.get_input_embeddings().requires_grad_(False)  # nothing reads it
    return model.train()


def samples_of(
    lengths: Sequence[tuple[int, int]], model: HovleForConditionalGeneration
) -> list[tuple[Tensor, Tensor]]:
    config, made = model.config.embedding_config, []
    for length, targets in lengths:
        ids = torch.randint(2, config.vocab_size, (length,))
        ids[2 : 2 + config.tokens_per_tile] = model.config.image_token_id
        made.append((ids, torch.where(torch.arange(length) < length - targets, -100, ids)))
    return made


def packed(samples: Sequence[tuple[Tensor, Tensor]], pixels: Tensor) -> Inputs:
    ids, labels = (torch.cat(parts)[None] for parts in zip(*samples, strict=True))
    positions = torch.cat([torch.arange(len(ids)) for ids, _ in samples])[None]
    return {"input_ids": ids, "position_ids": positions, "pixel_values": pixels}, labels


def padded(samples: Sequence[tuple[Tensor, Tensor]], pixels: Tensor) -> Inputs:
    ids, labels = zip(*samples, strict=True)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    inputs = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": mask,
        "pixel_values": pixels,
    }
    return inputs, pad_sequence(labels, batch_first=True, padding_value=-100)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare() -> dict[str, float]:
    """Packed and padded steps by turns."""
    model = build(SMALL_SIZES, vocab=2000, layers=4, image_size=112)
    weights = Weights(model, DTYPE)
    optimizers = build_optimizers(OptimConfig(name="muon", lr=1e-4), weights.masters)

    def step(attention: str, batch: Inputs) -> None:
        model.set_attn_implementation(attention)
        next_token_loss(model, *batch).backward()
        weights.collect()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weights.publish()

    result = {}
    totals = {"packed": 0.0, "padded": 0.0}
    draw = random.Random(0)
    for stage, counts in (("alignment", ALIGNMENT), ("instruction_tuning", INSTRUCTION_TUNING)):
        times, tokens, width = {"packed": 0.0, "padded": 0.0}, 0, 0
        for repeat in range(STEPS + 1):
            drawn = draw.choices(list(counts), weights=list(counts.values()), k=SAMPLES)
            lengths = [(length, max(2, length - NOT_TARGETS[stage])) for length in drawn]
            samples, pixels = samples_of(lengths, model), torch.randn(SAMPLES, 3, 112, 112).to(DTYPE)
            for side, attention, collate in (
                ("packed", PACKED_ATTENTION, packed),
                ("padded", "sdpa", padded),
            ):
                batch = collate(samples, pixels)
                spent = seconds(lambda attention=attention, batch=batch: step(attention, batch))
                times[side] += spent * (repeat > 0)  # the first one warms up
            tokens += sum(drawn) * (repeat > 0)
            width += SAMPLES * max(drawn) * (repeat > 0)
        print(
            f"{stage}: {tokens / times['packed']:.0f} useful tokens/s packed, {tokens / times['padded']:.0f} padded"
        )
        print(f"{stage}: {1 - tokens / width:.0%} of the padded batches is padding")
        result[f"ratio_{stage}"] = round(times["padded"] / times["packed"], 2)
        totals = {side: totals[side] + times[side] for side in totals}
    return {"ratio": round(totals["padded"] / totals["packed"], 2), **result}


def operations(model: HovleForConditionalGeneration, lengths: Sequence[tuple[int, int]]) -> float:
    """Floating point operations of forward and backward that no implementation can leave out."""
    config = model.config.embedding_config
    tokens, tiles = sum(length for length, _ in lengths), len(lengths)
    stacks = [*model.embedding.layers, *model.language_model.model.layers]
    block_weights = sum(p.numel() for layer in stacks for p in layer.parameters() if p.ndim == 2)
    work = 6.0 * block_weights * tokens
    work += 6.0 * model.get_output_embeddings().weight.numel() * sum(targets for _, targets in lengths)
    shuffle = sum(p.numel() for p in model.embedding.pixel_shuffle_proj.parameters() if p.ndim == 2)
    work += 6.0 * shuffle * config.tokens_per_tile * tiles
    patches = model.embedding.patch_embed.patch_embedding.weight.numel()
    work += 4.0 * patches * config.patches_per_side**2 * tiles  # pixels need no gradient
    # Scores and their product with the values: 2 matmuls forward, 4 backward, half of them hidden by causality.
    width = config.num_attention_heads * config.head_dim
    return work + len(stacks) * sum(6 * 2 * width * length**2 / 2 for length, _ in lengths)


def matmul_rate(a: Tensor, b: Tensor, duration: float = 3.0) -> float:
    """Operations a second of a @ b, kept up for `duration` seconds: a burst says more than a step can get."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + duration:
        a @ b
        count += 1
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[1] * count / (time.perf_counter() - start)


def share_of_peak() -> dict[str, float]:
    model = build(LARGE_SIZES, vocab=92553, layers=2, image_size=448)
    weights = Weights(model, DTYPE)
    model.set_attn_implementation(PACKED_ATTENTION)
    batch = packed(samples_of(LARGE, model), torch.randn(len(LARGE), 3, 448, 448).to(DTYPE))
    a, b = torch.randn(4096, 2048, dtype=DTYPE), torch.randn(2048, 8192, dtype=DTYPE)
    work, shares = operations(model, LARGE), []

    def step() -> None:
        next_token_loss(model, *batch).backward()
        weights.collect()

    for _ in range(LARGE_STEPS):
        before, rate, after = matmul_rate(a, b), work / seconds(step), matmul_rate(a, b)
        peak = (before + after) / 2
        shares.append(rate / peak)
        print(f"2.6B shapes: {rate / 1e12:.2f} of {peak / 1e12:.2f} TFLOP/s")
    return {"share_of_matmul_peak": round(sum(shares) / LARGE_STEPS, 2)}


def main() -> None:
    torch.manual_seed(0)
    print(f"{DTYPE}, {torch.get_num_threads()} threads")
    dtype = str(DTYPE).removeprefix("torch.")
    print(json.dumps({"benchmark": "train_step", "dtype": dtype, **compare(), **share_of_peak()}))


if __name__ == "__main__":
    main()

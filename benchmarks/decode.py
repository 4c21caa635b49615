"""Decoding: `generate` of a HoVLE with 1,024 prompt tokens (four tiles) and 64 new ones, greedy, one sequence.

Peers, in this process: the same model without a cache (its first tokens); transformers' own `generate` on a bare
Llama of the same depth, widths and prompt length, which has no pictures to embed; and reading the bytes of all weights
that a token needs, by the faster of two plain reads. All but the uncached run take turns, a whole answer each, and each
ratio is the median of the rounds'. Weights are random and in float32: PyTorch's bfloat16 vector-matrix
products on CPUs are no faster (half the bytes at half the rate).
"""

import json
import statistics
import time
import timeit
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hovle_core import HolisticEmbeddingConfig, HovleConfig, HovleForConditionalGeneration

WIDTHS = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 24, "num_key_value_heads": 8}
BLOCKS, LAYERS, VOCAB = 4, 8, 32_000
TILES, PROMPT, NEW = 4, 1024, 64
NEW_UNCACHED = 4  # its first tokens, which are its cheapest: the ratio is a lower bound
ROUNDS, READS = 3, 15
IMAGE_TOKEN = VOCAB - 1


def llama(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB, num_hidden_layers=layers, max_position_embeddings=4096, eos_token_id=None,
        bos_token_id=None, pad_token_id=0, **WIDTHS,
    )  # fmt: skip


def hovle() -> HovleForConditionalGeneration:
    embedding = HolisticEmbeddingConfig(vocab_size=VOCAB, num_hidden_layers=BLOCKS, **WIDTHS)
    assert TILES * embedding.tokens_per_tile == PROMPT
    config = HovleConfig(text_config=llama(LAYERS), embedding_config=embedding, image_token_id=IMAGE_TOKEN)
    return HovleForConditionalGeneration(config).eval()


def bytes_a_token(model: HovleForConditionalGeneration) -> int:
    """Weights that every new token reads: the blocks and the LLM but for its unused text embedding."""
    unused = model.language_model.get_input_embeddings().weight
    read = [*model.embedding.layers.parameters(), *model.language_model.parameters()]
    return sum(p.numel() * p.element_size() for p in read if p is not unused)


class Ticks(BaseStreamer):
    """Calls `tick` with the prompt and with every token."""

    def __init__(self, tick: Callable[[], None]):
        self.tick = tick

    def put(self, value: Any) -> None:
        self.tick()

    def end(self) -> None:
        pass


def generate(model: PreTrainedModel, tokens: int = NEW, **inputs: Any) -> torch.Tensor:
    mask = torch.ones(1, PROMPT, dtype=torch.long)
    return model.generate(**inputs, attention_mask=mask, max_new_tokens=tokens, do_sample=False)


def timed(model: PreTrainedModel, **inputs: Any) -> tuple[float, float, torch.Tensor]:
    """Seconds of a whole `generate`, of its median token behind the first, and the tokens."""
    ticks = [time.perf_counter()]
    tokens = generate(model, **inputs, streamer=Ticks(lambda: ticks.append(time.perf_counter())))
    whole = time.perf_counter() - ticks[0]
    # Turn 0 is what generate does before the prompt, turn 1 the prompt and the first token.
    return whole, statistics.median(b - a for a, b in pairwise(ticks[2:])), tokens


def reading(weights: torch.Tensor) -> float:
    """Median seconds of reading them once, by the faster of two ways."""
    vector = torch.ones(weights.shape[1])
    return min(
        statistics.median(timeit.repeat(read, number=1, repeat=READS))
        for read in (weights.sum, lambda: weights @ vector)
    )


def main() -> None:
    torch.manual_seed(0)
    model, bare = hovle(), LlamaForCausalLM(llama(BLOCKS + LAYERS)).eval()
    pictures = {
        "input_ids": torch.full((1, PROMPT), IMAGE_TOKEN),
        "pixel_values": torch.randn(TILES, 3, 448, 448),
    }
    text = {"input_ids": torch.randint(1, IMAGE_TOKEN, (1, PROMPT))}
    weights = torch.ones(bytes_a_token(model) // 4 // 4096, 4096)
    runs: dict[str, list[tuple[float, float, torch.Tensor]]] = {"hovle": [], "transformers": []}
    reads = []
    for _ in range(ROUNDS):
        runs["hovle"].append(timed(model, **pictures))
        runs["transformers"].append(timed(bare, **text))
        reads.append(reading(weights))
    # A machine that slows down for a round is slow for all of it.
    whole, step = (
        {name: statistics.median(run[i] for run in found) for name, found in runs.items()} for i in (0, 1)
    )
    bound = statistics.median(reads)
    start = time.perf_counter()
    uncached = generate(model, NEW_UNCACHED, **pictures, use_cache=False)
    without_cache = (time.perf_counter() - start) / NEW_UNCACHED
    assert torch.equal(uncached, runs["hovle"][0][2][:, : PROMPT + NEW_UNCACHED]), (
        "cached and uncached tokens differ"
    )
    print(
        f"{torch.get_num_threads()} threads, {weights.nbytes >> 20} MiB of weights a token; ms a token: "
        f"{ {name: round(1e3 * s, 1) for name, s in step.items()} }, reading the weights {1e3 * bound:.1f}; "
        f"tokens/s with the prompt: hovle {NEW / whole['hovle']:.2f}, "
        f"transformers {NEW / whole['transformers']:.2f}, without cache {1 / without_cache:.2f}"
    )

    def ratio(i: int) -> float:
        pairs = zip(runs["transformers"], runs["hovle"], strict=True)
        return round(statistics.median(theirs[i] / ours[i] for theirs, ours in pairs), 3)

    result = {
        "benchmark": "decode",
        "ratio_no_cache": round(without_cache * NEW / whole["hovle"], 1),
        "ratio_transformers": ratio(0),
        "ratio_transformers_after_prompt": ratio(1),
        "share_of_bandwidth_bound": round(bound / step["hovle"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

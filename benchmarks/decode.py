"""Decoding: `generate` of a HoVLE with 1,024 prompt tokens (four tiles) and 64 new ones, greedy, one sequence.

Peers, in this process: the same model without a cache (its first tokens); transformers' own `generate` on a bare
Llama of the same depth, widths and prompt length, which has no pictures to embed; and reading the bytes of all weights
that a token needs, by the faster of two plain reads. All but the uncached run take turns token by token, so that a
machine that slows down is slow for all of them. Weights are random and in float32: PyTorch's bfloat16 vector-matrix
products on CPUs are no faster (half the bytes at half the rate).
"""

import json
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hovle_core import HolisticEmbeddingConfig, HovleConfig, HovleForConditionalGeneration

WIDTHS = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 24, "num_key_value_heads": 8}
BLOCKS, LAYERS, VOCAB = 4, 8, 32_000
TILES, PROMPT, NEW = 4, 1024, 64
NEW_UNCACHED = 4  # its first tokens, which are its cheapest: the ratio is a lower bound
IMAGE_TOKEN = VOCAB - 1

Job = Callable[[Callable[[], None]], None]


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


def by_turns(jobs: dict[str, Job]) -> dict[str, list[float]]:
    """Run jobs in threads of which one works at a time; a job's `tick()` ends its turn. Seconds of each turn."""
    turns = [threading.Semaphore(0) for _ in jobs]
    seconds: dict[str, list[float]] = {name: [] for name in jobs}

    def run(i: int, name: str, job: Job) -> None:
        started = 0.0

        def tick() -> None:
            nonlocal started
            seconds[name].append(time.perf_counter() - started)
            turns[(i + 1) % len(turns)].release()
            turns[i].acquire()
            started = time.perf_counter()

        turns[i].acquire()
        started = time.perf_counter()
        job(tick)
        turns[(i + 1) % len(turns)].release()

    threads = [threading.Thread(target=run, args=(i, *item)) for i, item in enumerate(jobs.items())]
    for thread in threads:
        thread.start()
    turns[0].release()
    for thread in threads:
        thread.join()
    return seconds


def main() -> None:
    torch.manual_seed(0)
    model, bare = hovle(), LlamaForCausalLM(llama(BLOCKS + LAYERS)).eval()
    pictures = {
        "input_ids": torch.full((1, PROMPT), IMAGE_TOKEN),
        "pixel_values": torch.randn(TILES, 3, 448, 448),
    }
    text = {"input_ids": torch.randint(1, IMAGE_TOKEN, (1, PROMPT))}
    weights = torch.ones(bytes_a_token(model) // 4 // 4096, 4096)
    vector = torch.ones(4096)
    tokens: list[torch.Tensor] = []

    def read(how: Callable[[], torch.Tensor]) -> Job:
        def job(tick: Callable[[], None]) -> None:
            for _ in range(NEW + 1):
                how()
                tick()

        return job

    seconds = by_turns(
        {
            "hovle": lambda tick: tokens.append(generate(model, **pictures, streamer=Ticks(tick))),
            "transformers": lambda tick: tokens.append(generate(bare, **text, streamer=Ticks(tick))),
            "sum": read(weights.sum),
            "mv": read(lambda: weights @ vector),
        }
    )
    start = time.perf_counter()
    uncached = generate(model, NEW_UNCACHED, **pictures, use_cache=False)
    without_cache = (time.perf_counter() - start) / NEW_UNCACHED
    assert torch.equal(uncached, tokens[0][:, : PROMPT + NEW_UNCACHED]), "cached and uncached tokens differ"
    # Turn 0 is what generate does before the prompt, turn 1 the prompt and the first token.
    step = {name: statistics.median(turns[2:]) for name, turns in seconds.items()}
    whole = {name: sum(turns) for name, turns in seconds.items()}
    print(
        f"{torch.get_num_threads()} threads, {weights.nbytes >> 20} MiB of weights a token; ms a token: "
        f"{ {name: round(1e3 * s, 1) for name, s in step.items()} }; tokens/s with the prompt: "
        f"hovle {NEW / whole['hovle']:.2f}, transformers {NEW / whole['transformers']:.2f}, "
        f"without cache {1 / without_cache:.2f}; weights read at "
        f"{weights.nbytes / min(step['sum'], step['mv']) / 1e9:.1f} GB/s"
    )
    result = {
        "benchmark": "decode",
        "ratio_no_cache": round(without_cache * NEW / whole["hovle"], 1),
        "ratio_transformers": round(whole["transformers"] / whole["hovle"], 3),
        "ratio_transformers_after_prompt": round(step["transformers"] / step["hovle"], 3),
        "share_of_bandwidth_bound": round(min(step["sum"], step["mv"]) / step["hovle"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

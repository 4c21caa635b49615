"""Decoding: `generate` of a HoVLE with 1,024 prompt tokens (four tiles) and 64 new ones, greedy, one sequence.

Peers, in this process: the same model without a cache (its first tokens); transformers' own `generate` on a bare
Llama of the same depth, widths and prompt length, which has no pictures to embed; and reading the bytes of all weights
that a token needs, by the faster of two plain reads. Both `generate` run in greenlets that take turns after every
token, so that a machine that slows down is slow for both; each ratio is the median of the rounds'. Weights are random
and in float32: PyTorch's bfloat16 vector-matrix products on CPUs are no faster (half the bytes at half the rate).
"""

import json
import statistics
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
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


class Turns(BaseStreamer):
    """Lets the others go on after the prompt and after every token."""

    def put(self, value: Any) -> None:
        getcurrent().parent.switch()

    def end(self) -> None:
        pass


def generate(model: PreTrainedModel, tokens: int = NEW, **inputs: Any) -> torch.Tensor:
    mask = torch.ones(1, PROMPT, dtype=torch.long)
    return model.generate(**inputs, attention_mask=mask, max_new_tokens=tokens, do_sample=False)


@dataclass
class Answer:
    """Seconds of each turn: what `generate` does before the prompt, the prompt and the first token, then the others."""

    work: greenlet
    turns: list[float] = field(default_factory=list)
    tokens: torch.Tensor | None = None

    def go_on(self) -> None:
        start = time.perf_counter()
        self.tokens = self.work.switch()
        self.turns.append(time.perf_counter() - start)

    @property
    def whole(self) -> float:
        return sum(self.turns)

    @property
    def token(self) -> float:
        return statistics.median(self.turns[2:-1])


@torch.no_grad()  # of all greenlets: it is the thread's
def in_turns(runs: dict[str, tuple[PreTrainedModel, dict[str, Any]]]) -> dict[str, Answer]:
    answers = {
        name: Answer(greenlet(lambda model=model, inputs=inputs: generate(model, **inputs, streamer=Turns())))
        for name, (model, inputs) in runs.items()
    }
    while going := [answer for answer in answers.values() if not answer.work.dead]:
        for answer in going:
            answer.go_on()
    return answers


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
    runs: dict[str, tuple[PreTrainedModel, dict[str, Any]]] = {
        "hovle": (model, pictures),
        "transformers": (bare, text),
    }
    rounds, reads = [], []
    for number in range(ROUNDS):
        names = list(runs) if number % 2 else list(reversed(runs))
        rounds.append(in_turns({name: runs[name] for name in names}))
        reads.append(reading(weights))
    whole = {name: statistics.median(answers[name].whole for answers in rounds) for name in runs}
    token = {name: statistics.median(answers[name].token for answers in rounds) for name in runs}
    bound = statistics.median(reads)
    start = time.perf_counter()
    uncached = generate(model, NEW_UNCACHED, **pictures, use_cache=False)
    without_cache = (time.perf_counter() - start) / NEW_UNCACHED
    cached = rounds[0]["hovle"].tokens
    assert cached is not None
    assert torch.equal(uncached, cached[:, : PROMPT + NEW_UNCACHED]), "cached and uncached tokens differ"
    print(
        f"{torch.get_num_threads()} threads, {weights.nbytes >> 20} MiB of weights a token; ms a token: "
        f"{ {name: round(1e3 * s, 1) for name, s in token.items()} }, reading the weights {1e3 * bound:.1f}; "
        f"tokens/s with the prompt: hovle {NEW / whole['hovle']:.2f}, "
        f"transformers {NEW / whole['transformers']:.2f}, without cache {1 / without_cache:.2f}"
    )

    def ratio(measure: Callable[[Answer], float]) -> float:
        return round(statistics.median(measure(r["transformers"]) / measure(r["hovle"]) for r in rounds), 3)

    result = {
        "benchmark": "decode",
        "ratio_no_cache": round(without_cache * NEW / whole["hovle"], 1),
        "ratio_transformers": ratio(lambda answer: answer.whole),
        "ratio_transformers_after_prompt": ratio(lambda answer: answer.token),
        "share_of_bandwidth_bound": round(bound / token["hovle"], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

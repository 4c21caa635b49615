"""How the next token is chosen: greedily, or drawn with a generator of one's own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import HovleProcessor

# Below this, logits divided by the temperature overflow and nothing but the best token is ever drawn.
GREEDY_TEMPERATURE = 1e-5
# What `generate` would do and the engine does not: (field of generation_config, its neutral value).
_UNSUPPORTED = (
    ("repetition_penalty", 1.0), ("no_repeat_ngram_size", 0), ("encoder_repetition_penalty", 1.0), ("min_length", 0),
    ("min_new_tokens", 0), ("bad_words_ids", None), ("sequence_bias", None), ("forced_bos_token_id", None),
    ("forced_eos_token_id", None), ("begin_suppress_tokens", None), ("exponential_decay_length_penalty", None),
)  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How to answer. temperature 0 is greedy (top_p and seed then do nothing); seed None differs every time.

    Raises ValueError for a number out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1 (1 keeps every token)")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must be 0 or more and below 2**63")

    def generator(self) -> torch.Generator:
        """A new source of randomness for one conversation."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    def logits_processors(self, generator: torch.Generator) -> tuple[LogitsProcessor, ...]:
        """What `stream_answer` takes; nothing for greedy answers."""
        if self.temperature < GREEDY_TEMPERATURE:
            return ()
        nucleus = (TopPLogitsWarper(self.top_p),) if self.top_p < 1 else ()
        return (TemperatureLogitsWarper(self.temperature), *nucleus, Draw(generator))


class Draw(LogitsProcessor):
    """Draws a token of each row and leaves no other, so that greedy search takes it.

    transformers' own sampling reads the process's global generator: two conversations at once would disturb each
    other's seeds. The noise is made on the CPU, so a seed means the same on every device.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores [B, V]` -> 0 at the drawn token, -inf elsewhere."""
        # argmax p / Exp(1) is distributed as p (the exponential race).
        race = torch.empty(scores.shape).exponential_(generator=self.generator).to(scores.device)
        drawn = (scores.float().softmax(-1) / race).argmax(-1, keepdim=True)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)


def end_ids(model: HovleForConditionalGeneration, processor: HovleProcessor) -> frozenset[int]:
    """The model's end tokens and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return frozenset(end for end in (*ends, processor.tokenizer.eos_token_id) if end is not None)


def suppression(model: HovleForConditionalGeneration) -> SuppressTokensLogitsProcessor | None:
    """What generation_config never lets the model say. Raises ValueError for what the engine does not do."""
    config = model.generation_config
    for name, neutral in _UNSUPPORTED:
        if (value := getattr(config, name, None)) not in (None, neutral):
            raise ValueError(
                f"generation_config.{name} is {value!r}, which the server does not do; set it to {neutral!r}"
            )
    if not config.suppress_tokens:
        return None
    return SuppressTokensLogitsProcessor(config.suppress_tokens, device=model.device)

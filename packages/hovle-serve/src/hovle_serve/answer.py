"""One answer in the making: tokens are chosen, become text, and end at an end token, a stop string or the limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hovle_serve.sampling import Sampling
from hovle_serve.stream import Detokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability and those of the likeliest `(token id, logprob)`, before temperature and top_p."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What came since the last piece: whole characters, `logprobs` of its tokens if asked for, tokens so far."""

    text: str
    logprobs: tuple[TokenLogprob, ...]
    completion_tokens: int
    finish_reason: FinishReason | None = None


class StopStrings:
    """Text through, piece by piece, up to the first stop string; what may be the start of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown by now, and whether a stop string ended it."""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Answer:
    """The state of one answer between steps."""

    def __init__(
        self,
        tokenizer: Any,
        end_ids: frozenset[int],
        sampling: Sampling,
        stop: Sequence[str] = (),
        top_logprobs: int | None = None,
    ) -> None:
        self.sampling, self.end_ids, self.top_logprobs = sampling, end_ids, top_logprobs
        self.last_token = -1
        self.num_tokens = 0
        self._processors = sampling.logits_processors(sampling.generator())
        self._detokenizer, self._stops = Detokenizer(tokenizer), StopStrings(stop)
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is not shown yet

    @property
    def is_greedy(self) -> bool:
        return not self._processors

    def draw(self, scores: Tensor) -> int:
        """The next token's id from `scores [1, V]`."""
        no_ids = torch.empty(1, 0, dtype=torch.long, device=scores.device)
        for process in self._processors:
            scores = process(no_ids, scores)
        return int(scores.argmax(-1))

    def take(self, token_id: int, scores: Tensor) -> Piece | None:
        """Append a token that `scores [V]` gave. None where there is nothing to show yet."""
        self.last_token = token_id
        self.num_tokens += 1
        text, stopped, reason = "", False, None
        if token_id in self.end_ids:
            reason = "stop"
        else:
            if self.top_logprobs is not None:
                self._logprobs.append(_logprob(token_id, scores, self.top_logprobs))
            text, stopped = self._stops.push(self._detokenizer.push(token_id))
            if self.num_tokens >= self.sampling.max_new_tokens:
                reason = "length"
        if reason is not None and not stopped:  # an incomplete character, the beginning of a stop string
            rest, stopped = self._stops.push(self._detokenizer.flush())
            text += rest + self._stops.flush()
        if stopped:
            reason = "stop"
        return self._piece(text, reason) if text or reason else None

    def _piece(self, text: str, reason: Any) -> Piece:
        logprobs, self._logprobs = tuple(self._logprobs), []
        return Piece(text, logprobs, self.num_tokens, reason)


def _logprob(token_id: int, scores: Tensor, num_top: int) -> TokenLogprob:
    logprobs = scores.log_softmax(-1)
    values, ids = logprobs.topk(min(num_top, logprobs.numel()))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)

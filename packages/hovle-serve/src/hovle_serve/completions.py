"""Answers of the engine as an asyncio stream, and in OpenAI's shapes: whole, or as chunks of server-sent events."""

import asyncio
import json
import logging
import math
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from fastapi import Request as HttpRequest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hovle_core.processor import Encoded
from hovle_serve.answer import Piece, TokenLogprob
from hovle_serve.engine import Engine, Request
from hovle_serve.metrics import Metrics
from hovle_serve.prompts import Picture
from hovle_serve.protocol import ClientLeftError
from hovle_serve.sampling import Sampling

logger = logging.getLogger(__name__)

Events = AsyncGenerator[tuple[int, Piece], None]
# JSON knows no infinity; a token that is never said has this logprob.
_NEVER = -9999.0
_MAX_SPELLED = 2**14  # tokens of which one response keeps the text
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # a byte-fallback vocabulary's name of one
_BYTES = {written: byte for byte, written in bytes_to_unicode().items()}  # and how byte-level ones write it


async def answer(
    engine: Engine,
    metrics: Metrics,
    http: HttpRequest,
    prompt: Encoded,
    samplings: Sequence[Sampling],
    stop: Sequence[str] = (),
    top_logprobs: int | None = None,
) -> Events:
    """`(index, piece)` of one answer for each sampling, as they come.

    However it ends (closed, cancelled, the client gone: ClientLeftError), the places in the engine are freed and the
    tokens counted that it worked on. Raises also what `Engine.submit` raises, and whatever ended an answer.
    """
    loop, start = asyncio.get_running_loop(), time.monotonic()
    queue: asyncio.Queue[tuple[int, Piece | Exception]] = (
        asyncio.Queue()
    )  # holds no more than the answers' tokens

    def deliver_to(index: int) -> Callable[[Piece | Exception], None]:
        def deliver(item: Piece | Exception) -> None:
            if isinstance(item, Piece):
                counts[index] = item.completion_tokens
            try:
                loop.call_soon_threadsafe(queue.put_nowait, (index, item))
            except RuntimeError:  # the loop has closed, and with it who would have read this
                requests[index].cancel()

        return deliver

    counts = [0] * len(samplings)  # of tokens so far, also of those that nobody reads any more
    requests = [
        Request(prompt, sampling, deliver_to(i), stop=stop, top_logprobs=top_logprobs)
        for i, sampling in enumerate(samplings)
    ]
    num_prompt_tokens = len(prompt.input_ids)
    del prompt  # the engine drops its tiles as soon as they are read
    engine.submit(*requests)
    watch = asyncio.create_task(_watch(http, queue))
    last = [start] * len(requests)
    try:
        remaining = len(requests)
        while remaining:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            now = time.monotonic()
            (metrics.first_token if last[index] == start else metrics.between).observe(now - last[index])
            last[index] = now
            if item.finish_reason is not None:
                remaining -= 1
            yield index, item
    finally:
        watch.cancel()
        for request in requests:
            request.cancel()
        if any(counts):  # else it was given up in the queue, unread
            metrics.prompt_tokens.inc(num_prompt_tokens)
            metrics.completion_tokens.inc(sum(counts))


async def _watch(http: HttpRequest, queue: asyncio.Queue[tuple[int, Piece | Exception]]) -> None:
    """Tell the reader of the queue when the client hangs up, which may be long before there is anything to send."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    queue.put_nowait((-1, ClientLeftError()))


@dataclass(frozen=True)
class Completion:
    """OpenAI's shapes of one response."""

    model: str
    tokenizer: Any
    num_prompt_tokens: int
    num_image_tokens: int
    pictures: Sequence[Picture]
    num_choices: int
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, events: Events) -> dict[str, Any]:
        """The response of a request that does not stream."""
        texts: list[list[str]] = [[] for _ in range(self.num_choices)]
        logprobs: list[list[dict[str, Any]]] = [[] for _ in range(self.num_choices)]
        last: list[Any] = [None] * self.num_choices
        async with aclosing(events):
            async for index, piece in events:
                texts[index].append(piece.text)
                # Not at the end, when those of all tokens together would keep everybody waiting.
                logprobs[index] += self._token_logprobs(piece, is_first=last[index] is None)
                last[index] = piece
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(texts[index])},
                "logprobs": _logprobs(logprobs[index]),
                "finish_reason": last[index].finish_reason,
            }
            for index in range(self.num_choices)
        ]
        usage = self._usage([piece.completion_tokens for piece in last])
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    async def stream(
        self,
        first: tuple[int, Piece],
        events: Events,
        include_usage: bool,
        failure: Callable[[Exception], dict[str, Any]],
    ) -> AsyncGenerator[str, None]:
        """The same as server-sent events; `failure` gives the body of an error that comes in the middle."""
        started: set[int] = set()
        counts = [0] * self.num_choices
        usage = {"usage": None} if include_usage else {}
        try:
            async with aclosing(_after(first, events)) as every:
                async for index, piece in every:
                    counts[index] = piece.completion_tokens
                    for choice in self._chunks(index, piece, is_first=index not in started):
                        yield _event({**self._head("chat.completion.chunk"), "choices": [choice], **usage})
                    started.add(index)
        except ClientLeftError:
            return
        except Exception as error:
            logger.warning("a stream ended early: %s: %s", type(error).__name__, error)
            yield _event(failure(error))
            return
        if include_usage:
            yield _event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(counts)})
        yield "data: [DONE]\n\n"

    def _chunks(self, index: int, piece: Piece, is_first: bool) -> list[dict[str, Any]]:
        def choice(delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
            return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

        chunks = [choice({"role": "assistant", "content": ""})] if is_first else []
        if piece.text or piece.logprobs:
            logprobs = _logprobs(self._token_logprobs(piece, is_first))
            chunks.append(choice({"content": piece.text}, logprobs))
        if piece.finish_reason is not None:
            chunks.append(choice({}, reason=piece.finish_reason))
        return chunks

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self, counts: Sequence[int]) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": sum(counts),
            "total_tokens": self.num_prompt_tokens + sum(counts),
            "prompt_tokens_details": {
                "image_tokens": self.num_image_tokens,
                "images": [asdict(picture) for picture in self.pictures],
            },
        }

    def _token_logprobs(self, piece: Piece, is_first: bool) -> list[dict[str, Any]]:
        """Of the tokens of a piece, which may be the answer's first."""
        tokens = []
        for token in piece.logprobs:
            tokens.append(self._token_logprob(token, is_first))
            is_first = is_first and tokens[-1]["bytes"] is None  # special tokens are no beginning
        return tokens

    def _token_logprob(self, token: TokenLogprob, is_first: bool) -> dict[str, Any]:
        top = [self._token(*entry, is_first) for entry in token.top]
        return {**self._token(token.token_id, token.logprob, is_first), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float, is_first: bool) -> dict[str, Any]:
        text, spelling = self._spelled(token_id, is_first)
        return {"token": text, "logprob": logprob if math.isfinite(logprob) else _NEVER, "bytes": spelling}

    @cached_property
    def _spelled(self) -> Callable[[int, bool], tuple[str, list[int] | None]]:
        """Text and bytes of a token, at the beginning of a text or within. Of the likeliest ones most are so time and
        again."""

        @lru_cache(_MAX_SPELLED)
        def spelled(token_id: int, is_first: bool) -> tuple[str, list[int] | None]:
            return _spelled(self.tokenizer, token_id, is_first)

        return spelled


def _spelled(tokenizer: Any, token_id: int, is_first: bool) -> tuple[str, list[int] | None]:
    """Text and bytes of a token. Special tokens, of which an answer says nothing, have no bytes."""

    def decode(*ids: int, **options: Any) -> str:
        return tokenizer.decode([*ids], clean_up_tokenization_spaces=False, **options)

    text = decode(token_id)
    if text and not decode(token_id, skip_special_tokens=True):
        return text, None
    if not is_first:  # a tokenizer may drop the space that a text begins with
        twice = decode(token_id, token_id)
        text = twice[len(text) :] if twice.startswith(text) else text
    return text, _bytes(tokenizer.convert_ids_to_tokens(token_id), text)


def _bytes(name: str, text: str) -> list[int] | None:
    """Of a token that the vocabulary calls `name`. One that is part of a character has no text of its own."""
    if "\ufffd" not in text or "\ufffd" in name:
        return list(text.encode())
    if found := _BYTE.fullmatch(name):
        return [int(found[1], 16)]
    return [_BYTES[character] for character in name] if _BYTES.keys() >= {*name} else None


def _logprobs(tokens: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"content": tokens, "refusal": None} if tokens else None


async def _after(first: tuple[int, Piece], events: Events) -> Events:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"

"""Continuous batching: one thread owns the model, and requests join and leave the batch between any two steps.

A step: drop who was cancelled, prefill who waits and fits, then decode one token of every row. Prompts of like length
are read together. A request's whole length is reserved when it is taken in, so that nobody is ever put out again: the
queue is first come, first served, and its head waits until it fits.
"""

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from threading import Condition, Event, Thread

import torch
from torch import Tensor

from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import Encoded, HovleProcessor
from hovle_serve.answer import Answer, Piece
from hovle_serve.batch import DecodeBatch, Prefilled, block_length, check_batchable
from hovle_serve.linear import use_few_rows_linear
from hovle_serve.prefix import PrefixCache, Read, without_tiles
from hovle_serve.sampling import Sampling, end_ids, suppression
from hovle_serve.stream import max_answer_tokens

logger = logging.getLogger(__name__)

THREAD_NAME = "hovle-engine"
# Prompt tokens run between two steps: whoever is being answered waits no longer than these take, or one prompt.
PREFILL_TOKENS = 2048
# Beyond so much in the queue, one more with pictures finds it full; a picture of 12 tiles of 448 pixels is 8 MB.
MAX_WAITING_TILE_BYTES = 2**30


class QueueFullError(RuntimeError):
    """So many requests wait already that this one is better sent again later."""


class EngineClosedError(RuntimeError):
    """The engine is shutting down."""


@dataclass(eq=False)
class Request:
    """A prompt to answer. `deliver` is called in the engine's thread with each Piece, the last of which has a
    finish_reason, or with the exception that ended the answer; it must be quick and must not raise. A cancelled
    request hears nothing more.

    Its prompt and limit of tokens are checked when it is submitted. The prompt's tiles are dropped when they were read.
    """

    prompt: Encoded
    sampling: Sampling
    deliver: Callable[[Piece | Exception], None]
    stop: Sequence[str] = ()
    top_logprobs: int | None = None
    _cancelled: Event = field(default_factory=Event, repr=False)

    def cancel(self) -> None:
        """Free its place before the next step. May be called from any thread, and after the end."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()


@dataclass
class _Active:
    request: Request
    answer: Answer
    reserved: int


class Engine:
    """Answers requests with one model; the thread runs from construction to `close`.

    Args:
        max_batch: rows that decode together.
        max_cache_tokens: bounds rows times the longest of them, prompt and answer, as the blocks count tokens.
        max_queue: requests that may wait.
        max_prefix_tokens: on top of these, tokens of the newest prompts, kept for others that begin alike.

    On CPUs the model's linear layers become FewRowsLinear, which the steps of many rows are faster with.

    Raises ValueError for a model it cannot batch, or whose generation_config asks for what it does not do.
    """

    def __init__(
        self,
        model: HovleForConditionalGeneration,
        processor: HovleProcessor,
        max_batch: int = 16,
        max_cache_tokens: int = 65536,
        max_queue: int = 64,
        max_prefix_tokens: int = 16384,
    ) -> None:
        for name, value in (
            ("max_batch", max_batch),
            ("max_cache_tokens", max_cache_tokens),
            ("max_queue", max_queue),
        ):
            if value < 1:
                raise ValueError(f"{name} {value} must be 1 or more")
        check_batchable(model)
        use_few_rows_linear(model)
        self.model, self.processor = model, processor
        #: For decoding: the processor's own holds state while it encodes, which other threads do meanwhile.
        self.tokenizer = copy.deepcopy(processor.tokenizer)
        self.max_batch, self.max_cache_tokens, self.max_queue = max_batch, max_cache_tokens, max_queue
        self._suppress = suppression(model)
        self._end_ids = end_ids(model, processor)
        self._changed = Condition()
        self._waiting: deque[Request] = deque()
        self._is_closing = False
        self._active: list[_Active] = []  # in the order of the batch's rows
        self._batch = DecodeBatch(model)
        self._prefixes = PrefixCache(model, processor, max_prefix_tokens)
        self.steps = 0
        self._thread = Thread(target=self._run, name=THREAD_NAME)
        self._thread.start()

    # ---- any thread ------------------------------------------------------------------------------------------------

    def submit(self, *requests: Request) -> None:
        """Put requests in the queue, all or none.

        Raises QueueFullError, EngineClosedError, and ValueError for one that is too long for the model or for
        max_cache_tokens.
        """
        for request in requests:
            self.check(request.prompt, request.sampling.max_new_tokens)
        with self._changed:
            if self._is_closing:
                raise EngineClosedError("the server is shutting down")
            if not self.has_room(len(requests), _tile_bytes(requests)):
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already, the queue holds {self.max_queue}, and of their "
                    f"pictures {MAX_WAITING_TILE_BYTES} bytes"
                )
            self._waiting.extend(requests)
            self._changed.notify()

    def check(self, prompt: Encoded, max_new_tokens: int) -> None:
        """Raise ValueError unless model and cache have room for that many tokens behind the prompt."""
        if max_new_tokens > (room := self.room(prompt)):
            raise ValueError(
                f"max_tokens {max_new_tokens} is more than the {room} for which there is room behind the prompt of "
                f"{len(prompt.input_ids)} tokens"
            )

    def room(self, prompt: Encoded) -> int:
        """How many tokens may follow a prompt, at least 1. Raises ValueError if there is room for none."""
        room = self.max_cache_tokens - block_length(self.model, prompt)
        if room < 1:
            raise ValueError(
                f"the conversation takes {self.max_cache_tokens - room} tokens and the cache has room for "
                f"{self.max_cache_tokens}: start a new one, or give fewer or smaller pictures"
            )
        return min(room, max_answer_tokens(self.model.config, prompt))

    def has_room(self, num_requests: int = 1, tile_bytes: int = 0) -> bool:
        """Whether that many could be queued now, with so much of pictures; some pictures may always wait."""
        with self._changed:
            waiting = _tile_bytes(self._waiting) if tile_bytes else 0
            has_bytes = not waiting or waiting + tile_bytes <= MAX_WAITING_TILE_BYTES
            return len(self._waiting) + num_requests <= self.max_queue and has_bytes

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def cached_tokens(self) -> int:
        return self._batch.cached_tokens

    @property
    def reused_tokens(self) -> int:
        """Tokens of prompts that were not read again, so far."""
        return self._prefixes.reused_tokens

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self._is_closing

    def close(self) -> None:
        """End the step in work and the thread; who is not answered yet hears EngineClosedError."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._step()
        finally:
            with self._changed:
                self._is_closing = True
                self._fail_active(closed := EngineClosedError("the server is shutting down"))
                for request in self._waiting:
                    _deliver(request, closed)
                self._waiting.clear()

    def _step(self) -> None:
        try:
            self._drop_cancelled()
            self._admit()
            if self._active:
                self._decode()
        except Exception as error:
            # Out of memory, say: the cache may be half written, so nobody in it can go on. Clients hear only that it
            # failed; why is for who runs the server.
            logger.exception("a step failed, and %d answers with it", len(self._active))
            self._fail_active(error)

    def _fail_active(self, error: Exception) -> None:
        for active in self._active:
            _deliver(active.request, error)
        self._active, self._batch = [], DecodeBatch(self.model)

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._waiting or self._active)
            return not self._is_closing

    def _drop_cancelled(self) -> None:
        with self._changed:
            for request in [request for request in self._waiting if request.is_cancelled]:
                self._waiting.remove(request)
        self._keep([i for i, active in enumerate(self._active) if not active.request.is_cancelled])

    def _keep(self, rows: Sequence[int]) -> None:
        if len(rows) < len(self._active):
            self._batch.keep(rows)
            self._active = [self._active[i] for i in rows]

    def _admit(self) -> None:
        """Prefill from the head of the queue, and let who is not finished by that join the batch."""
        asked: list[list[_Active]] = []  # several answers to one prompt read it once
        taken: list[_Active] = []
        spent = 0
        while spent < PREFILL_TOKENS and (active := self._next_that_fits(taken)) is not None:
            taken.append(active)
            if asked and asked[-1][0].request.prompt is active.request.prompt:
                asked[-1].append(active)
            else:
                asked.append([active])
                spent += len(active.request.prompt.input_ids)
        rows: list[list[Prefilled]] = [[] for _ in asked]  # the batch is in the order of the queue
        try:
            for place, read in self._prefixes.read([same[0].request.prompt for same in asked]):
                asked[place] = [active for active in asked[place] if self._begin(active, read)]
                if not isinstance(read, Exception):
                    rows[place] = [read[0]] * len(asked[place])
        finally:  # who was not read hears of it with the others
            self._active += [active for same in asked for active in same]
        if joining := [row for same in rows for row in same]:
            self._batch.join(joining)

    def _begin(self, active: _Active, read: Read | Exception) -> bool:
        """Deliver the first token behind a prompt, or what went wrong with it; whether there is more to say."""
        active.request.prompt = without_tiles(active.request.prompt)
        try:
            if isinstance(read, Exception):
                raise read
            return not self._take([active], read[1])[0]
        except Exception as error:  # whatever it is, it is this request's alone
            logger.exception("a prompt of %d tokens failed", len(active.request.prompt.input_ids))
            _deliver(active.request, error)
            return False

    def _next_that_fits(self, taken: Sequence[_Active]) -> _Active | None:
        """Take the queue's head out, unless batch or cache have no room for it yet beside those taken before."""
        with self._changed:
            while self._waiting and self._waiting[0].is_cancelled:
                self._waiting.popleft()
            if not self._waiting:
                return None
            request = self._waiting[0]
            reserved = block_length(self.model, request.prompt) + request.sampling.max_new_tokens
            longest = max([reserved, *(active.reserved for active in (*self._active, *taken))])
            rows = len(self._active) + len(taken) + 1
            if rows > self.max_batch or rows * longest > self.max_cache_tokens:
                return None
            self._waiting.popleft()
        answer = Answer(self.tokenizer, self._end_ids, request.sampling, request.stop, request.top_logprobs)
        return _Active(request, answer, reserved)

    def _decode(self) -> None:
        logits = self._batch.step([active.answer.last_token for active in self._active])
        self.steps += 1
        is_finished = self._take(self._active, logits)
        self._keep([i for i, done in enumerate(is_finished) if not done])

    def _take(self, rows: Sequence[_Active], logits: Tensor) -> list[bool]:
        """Choose each row's next token from `logits [B, V]` and deliver; whose answer is complete."""
        scores = logits.float()  # as generate does
        if self._suppress is not None:
            scores = self._suppress(None, scores)
        best = scores.argmax(-1).tolist()
        finished = []
        for i, active in enumerate(rows):
            token = best[i] if active.answer.is_greedy else active.answer.draw(scores[i : i + 1])
            piece = active.answer.take(token, scores[i])
            if piece is not None:
                _deliver(active.request, piece)
            finished.append(piece is not None and piece.finish_reason is not None)
        return finished


def _tile_bytes(requests: Iterable[Request]) -> int:
    """Of their prompts, which several may share."""
    return sum({id(request.prompt): request.prompt.tiles.nbytes for request in requests}.values())


def _deliver(request: Request, item: Piece | Exception) -> None:
    if not request.is_cancelled:
        request.deliver(item)

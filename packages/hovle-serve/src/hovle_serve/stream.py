"""One answer as a stream of text: tokens become whole characters, `generate` runs in a thread and can be stopped."""

import copy
from collections.abc import Generator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hovle_core.config import HovleConfig
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import Encoded, HovleProcessor
from hovle_serve.sampling import end_ids

THREAD_NAME = "hovle-answer"
# What decoders write for bytes that are no character, or not a whole one yet.
_REPLACEMENT = "\ufffd"
_MAX_HELD = 3  # tokens, of a byte or more each: as many as a character can be without its last


class Detokenizer:
    """Token ids, one at a time -> text, in pieces of whole characters.

    All pieces together are what the tokenizer decodes from all ids (without special tokens). A token that ends
    within a character gives nothing; the piece comes with the token that completes it, or that shows that it never
    will be. No more than _MAX_HELD tokens are held back for that, also of text that is full of U+FFFD.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # The last piece is decoded again with the next one, since tokenizers treat the first token of a text specially.
        self._given: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes, or ""."""
        if self._held and self._is_silent(token_id):
            return ""
        self._held.append(token_id)
        return self._take()

    def flush(self) -> str:
        """What is left at the end: "" or characters that stayed incomplete, as U+FFFD."""
        return self._give(len(self._held))

    def _take(self) -> str:
        text, count = self._text(self._held), len(self._held)
        if not text.endswith(_REPLACEMENT):
            return self._give(count, text) if text else ""
        if count <= _MAX_HELD:
            return ""
        # An end of a character is where both sides say no more than the whole. Byte-fallback decoders even say less
        # there: they unmake a whole run that ends within a character.
        ends = range(count - _MAX_HELD, count)
        lengths = [len(self._text(self._held[:end])) + len(self._text(self._held[end:])) for end in ends]
        if (least := min(lengths)) > len(text):  # tokens with an end and a beginning, one after another
            return ""
        return self._give(ends[lengths.index(least)]) + self._take()

    def _give(self, count: int, text: str | None = None) -> str:
        text = self._text(self._held[:count]) if text is None else text
        # A space that was dropped at the beginning still is what the text begins with.
        self._given = self._held[:count] if text else self._given + self._held[:count]
        del self._held[:count]
        return text

    def _text(self, ids: list[int]) -> str:
        """What `ids` say behind what has been given."""
        before, whole = self._decode(self._given), self._decode(self._given + ids)
        behind = whole.removeprefix(before)
        if whole.startswith(before) and _REPLACEMENT not in behind:
            return behind
        # Has a run been unmade that began in what is given? That stays; and `ids` begin with no space to lose.
        alone = self._decode(ids)
        is_unmade = not whole.startswith(before) or behind.count(_REPLACEMENT) > alone.count(_REPLACEMENT)
        return alone if is_unmade else behind

    def _is_silent(self, token_id: int) -> bool:
        """Whether it is a special token. A space that is dropped at the beginning is none."""
        return not self._decode([token_id]) and bool(self._tokenizer.decode([token_id]))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream_answer(
    model: HovleForConditionalGeneration,
    processor: HovleProcessor,
    prompt: Encoded,
    max_new_tokens: int,
    logits_processors: tuple[LogitsProcessor, ...] = (),
) -> Generator[str, None, None]:
    """The answer to an encoded prompt, in pieces; greedy but for what `logits_processors` do.

    `generate` runs in a thread, started by the first `next()`. Its exceptions are raised here. Closing the
    iterator stops it after the token in work and waits for it.
    """
    go: SimpleQueue[None] = SimpleQueue()
    stop, pieces = Event(), _Pieces(Detokenizer(processor.tokenizer))
    arguments = {
        **processor.batch([prompt], model.device),
        "generation_config": _generation_config(model, processor, max_new_tokens),
        "logits_processor": LogitsProcessorList(logits_processors),
        "stopping_criteria": StoppingCriteriaList([_StopWhenSet(stop)]),
        "streamer": pieces,
    }

    def work() -> None:
        go.get()
        if stop.is_set():
            return
        try:
            model.generate(**arguments)
            pieces.queue.put(None)
        except BaseException as error:
            pieces.queue.put(error)

    thread = Thread(target=work, name=THREAD_NAME)
    try:
        # Ctrl-C can end start() when the thread is there and cannot be waited for yet: it works only when told so,
        # through a queue, since an Event that Ctrl-C leaves in the middle of set() is locked for good.
        thread.start()
        go.put(None)
        while (piece := pieces.queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        stop.set()
        go.put(None)
        if thread.is_alive():
            thread.join()


def max_answer_tokens(config: HovleConfig, prompt: Encoded) -> int:
    """How many tokens may follow a prompt before the LLM or the embedding blocks run out of positions.

    Raises ValueError if there is room for none, with both counts.
    """
    T = len(prompt.input_ids)
    embedding: Any = config.embedding_config
    num_image_tokens = int((prompt.input_ids == config.image_token_id).sum())
    block_tokens = T + num_image_tokens * (embedding.block_tokens_per_placeholder - 1)
    room = embedding.max_position_embeddings - block_tokens
    if (positions := getattr(config.text_config, "max_position_embeddings", None)) is not None:
        room = min(room, positions - T)
    if room < 1:
        raise ValueError(
            f"the conversation takes {T} tokens ({num_image_tokens} of them pictures) and the model has room for "
            f"{T + room}: start a new one, or give fewer or smaller pictures"
        )
    return room


class _Pieces(BaseStreamer):
    """What `generate` calls with each token; `queue` holds text, at the end None or the exception."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self.queue: SimpleQueue[str | BaseException | None] = SimpleQueue()
        self._detokenizer = detokenizer
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self._is_prompt:  # generate hands over the prompt first
            self._is_prompt = False
            return
        for token_id in value.flatten().tolist():
            self._put(self._detokenizer.push(token_id))

    def end(self) -> None:
        self._put(self._detokenizer.flush())

    def _put(self, text: str) -> None:
        if text:
            self.queue.put(text)


class _StopWhenSet(StoppingCriteria):
    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full(
            (input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device
        )


def _generation_config(
    model: HovleForConditionalGeneration, processor: HovleProcessor, max_new_tokens: int
) -> Any:
    """The model's own, without sampling, ending also at the tokenizer's end token."""
    config, tokenizer = copy.deepcopy(model.generation_config), processor.tokenizer
    config.eos_token_id = sorted(end_ids(model, processor))
    if config.pad_token_id is None:
        config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.eos_token_id[0]
        )
    config.do_sample, config.num_beams = False, 1
    config.temperature = config.top_p = config.top_k = config.max_length = None
    config.max_new_tokens = max_new_tokens
    return config

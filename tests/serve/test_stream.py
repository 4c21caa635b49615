"""Text comes in whole characters, and all pieces together, or the bytes of all tokens, are what is decoded."""

import asyncio
import json
import threading
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from hovle_core.testing import tiny_tokenizer
from hovle_serve.answer import Piece, TokenLogprob
from hovle_serve.completions import Completion
from hovle_serve.stream import THREAD_NAME, Detokenizer, max_answer_tokens, stream_answer

TEXTS = ["日本語の猫", "a 🐈‍⬛ and 👩🏽‍🚀!", "naïve — “q”", "\n\n  indented\n", "Ω≈ç√ 한국어 ไทย", "🇫🇷"]
BYTES = tiny_tokenizer()  # every character beyond ASCII is two to four tokens
IDS = st.lists(st.integers(0, len(BYTES) - 1), max_size=40)


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's and InternLM's: words with "▁", characters that are unknown as bytes."""
    words = ["▁a", "▁cat", "c", "a", "t", "▁", "!"]
    vocabulary = {
        token: i for i, token in enumerate(["<unk>", *words, *(f"<0x{b:02X}>" for b in range(256))])
    }
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


class Joined:
    """A byte-level tokenizer with any tokens."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens

    def decode(self, ids, **options) -> str:
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")


FALLBACK = fallback_tokenizer()
TOKENIZERS = pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte-level", "byte-fallback"])


def pieces_of(tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def whole(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
@TOKENIZERS
def test_no_character_is_split(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == whole(tokenizer, ids) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""  # nothing was held back longer than needed


def test_a_character_comes_with_its_last_token():
    ids = BYTES("猫", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    assert pieces_of(BYTES, ids) == ["", "", "猫", ""]


def test_a_space_before_a_word_survives_decoders_that_strip_the_first():
    ids = FALLBACK.convert_tokens_to_ids(["▁a", "▁cat", "▁a"])
    assert pieces_of(FALLBACK, ids) == ["a", " cat", " a", ""]


def test_special_tokens_are_silent_and_an_unfinished_character_is_shown_at_the_end():
    start, end = BYTES.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    first_two = BYTES("猫", add_special_tokens=False)["input_ids"][:2]
    assert pieces_of(BYTES, [start, *first_two, end]) == ["", "", "", "", "\ufffd"]


@given(IDS)
def test_pieces_join_to_the_decoded_whole_for_any_tokens(ids):
    """Also for bytes that are no text at all."""
    pieces = pieces_of(BYTES, ids)
    assert "".join(pieces) == whole(BYTES, ids)


@pytest.mark.parametrize("unit", ["\ufffd", "\ufffd猫", "🐈\ufffd\ufffd a cat", "\ufffd a é\ufffd🐈"])
@TOKENIZERS
def test_a_replacement_character_that_was_meant_is_not_waited_behind(tokenizer, unit, monkeypatch):
    """Neither is it, and all behind it, decoded again with every token."""
    text = unit * 200
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    said, decode, decoded = whole(tokenizer, ids), tokenizer.decode, []

    def counted(ids, **options):
        decoded.append(len(ids))
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", counted)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == said == text
    assert sum(decoded) < 100 * len(ids)
    silent = "".join("-" if piece else " " for piece in pieces[:-1])
    assert (
        " " * 5 not in silent
    )  # a space that the text begins without, and what may be a character of four bytes


def test_special_tokens_within_a_character_are_silent_however_many():
    start = BYTES.convert_tokens_to_ids("<|im_start|>")
    first, *rest = BYTES("猫", add_special_tokens=False)["input_ids"]
    assert pieces_of(BYTES, [first, *[start] * 9, *rest]) == [*[""] * 11, "猫", ""]


@given(
    st.lists(st.sampled_from([b"\xef\xbf\xbd", b"a", "猫".encode(), "é".encode()]), max_size=30), st.randoms()
)
def test_tokens_with_the_end_of_a_character_and_the_beginning_of_another(characters, random):
    data, tokens = b"".join(characters), []
    while data:
        size = random.randint(1, 4)
        tokens.append(data[:size])
        data = data[size:]
    tokenizer = Joined(tokens)
    assert "".join(pieces_of(tokenizer, [*range(len(tokens))])) == b"".join(characters).decode()


async def delivered(tokenizer, ids: list[int]):
    """As the engine delivers them: a token that says nothing yet comes with the next one."""
    detokenizer, waiting = Detokenizer(tokenizer), []
    for i, token in enumerate(ids):
        waiting.append(TokenLogprob(token, -1.0, ((token, -1.0),)))
        if text := detokenizer.push(token):
            yield 0, Piece(text, tuple(waiting), i + 1, None)
            waiting = []
    yield 0, Piece(detokenizer.flush(), tuple(waiting), len(ids), "length")


def whole_answer(tokenizer, ids: list[int]) -> tuple[str, list[dict]]:
    completion = Completion("tiny", tokenizer, 1, 0, (), 1)
    choice = asyncio.run(completion.whole(delivered(tokenizer, ids)))["choices"][0]
    return choice["message"]["content"], choice["logprobs"]["content"]


def streamed_answer(tokenizer, ids: list[int]) -> list[dict]:
    async def tokens():
        events = delivered(tokenizer, ids)
        stream = Completion("tiny", tokenizer, 1, 0, (), 1).stream(await anext(events), events, False, repr)
        chunks = [json.loads(event[6:]) async for event in stream if "[DONE]" not in event]
        listed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        return [token for one in listed if one for token in one["content"]]

    return asyncio.run(tokens())


def joined(tokens: list[dict]) -> str:
    return b"".join(bytes(token["bytes"] or []) for token in tokens).decode()


@TOKENIZERS
@pytest.mark.parametrize(
    "text", ["a cat a cat", " a  cat", "naïve 猫 🐈!", "\ufffd a\ufffd", "a\n\nt", "猫 a"]
)
def test_the_bytes_of_all_tokens_are_the_content(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    content, tokens = whole_answer(tokenizer, ids)
    assert joined(tokens) == content == whole(tokenizer, ids) == text
    assert [token["top_logprobs"][0]["bytes"] for token in tokens] == [token["bytes"] for token in tokens]
    assert streamed_answer(tokenizer, ids) == tokens


def test_a_word_has_its_space_but_where_the_text_begins():
    ids = FALLBACK.convert_tokens_to_ids(["▁cat", "▁cat", "▁", "▁cat"])
    content, tokens = whole_answer(FALLBACK, ids)
    assert content == "cat cat  cat"
    assert [token["token"] for token in tokens] == ["cat", " cat", " ", " cat"]


@TOKENIZERS
def test_part_of_a_character_has_its_bytes(tokenizer):
    ids = tokenizer("a猫", add_special_tokens=False)["input_ids"][-3:]
    content, tokens = whole_answer(tokenizer, ids)
    assert content == "猫"
    assert [token["bytes"] for token in tokens] == [[byte] for byte in "猫".encode()]
    assert {token["token"] for token in tokens} == {"\ufffd"}


def test_special_tokens_have_a_name_and_no_bytes():
    ids = [FALLBACK.unk_token_id, *FALLBACK.convert_tokens_to_ids(["▁cat", "<unk>", "▁a"])]
    content, tokens = whole_answer(FALLBACK, ids)
    assert joined(tokens) == content == "cat a"
    assert [(token["token"], token["bytes"] is None) for token in tokens] == [
        ("<unk>", True), ("cat", False), ("<unk>", True), (" a", False),
    ]  # fmt: skip


def prompt_of(processor, text: str):
    return processor.encode([{"role": "user", "content": text}], add_generation_prompt=True)


def test_a_stream_is_what_generate_answers_in_a_batch(model, processor):
    prompts = [prompt_of(processor, text) for text in ("hi", "what is a red square?", "blue")]
    inputs = processor.batch(prompts)
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answers = processor.tokenizer.batch_decode(
        out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        pieces = list(stream_answer(model, processor, prompt, 16))
        assert "".join(pieces) == answer
        assert len(pieces) == 16  # token by token


def test_it_ends_at_the_tokenizers_end_token_even_if_the_model_does_not_know_it(model, processor):
    prompt = prompt_of(processor, "hi")
    first = next(stream := stream_answer(model, processor, prompt, 16))
    stream.close()
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens.remove(processor.tokenizer.eos_token_id)
    with torch.no_grad():  # make the end token win over whatever came first, by a little
        said = processor.tokenizer.convert_tokens_to_ids(processor.tokenizer.tokenize(first))[0]
        table = model.get_output_embeddings().weight
        table[processor.tokenizer.eos_token_id] = table[said] * 1.5
    assert list(stream_answer(model, processor, prompt, 16)) == []


def test_closing_stops_the_thread_in_the_middle(model, processor):
    steps = []
    model.language_model.register_forward_pre_hook(lambda *_: steps.append(1))
    with closing(stream_answer(model, processor, prompt_of(processor, "hi"), 400)) as pieces:
        assert next(pieces)
        assert THREAD_NAME in [thread.name for thread in threading.enumerate()]
    assert THREAD_NAME not in [thread.name for thread in threading.enumerate()]
    assert len(steps) < 350


def test_nothing_runs_before_the_first_piece_is_asked_for(model, processor):
    pieces = stream_answer(model, processor, prompt_of(processor, "hi"), 400)
    assert THREAD_NAME not in [thread.name for thread in threading.enumerate()]
    pieces.close()
    assert THREAD_NAME not in [thread.name for thread in threading.enumerate()]


def test_an_exception_of_the_thread_reaches_the_caller(model, processor):
    steps = []

    def fail(*_):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("out of memory")

    model.language_model.register_forward_pre_hook(fail)
    pieces = stream_answer(model, processor, prompt_of(processor, "hi"), 16)
    assert next(pieces)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(pieces)


def test_room_is_that_of_the_shorter_of_llm_and_blocks(model, processor):
    prompt = prompt_of(processor, "hi")
    T = len(prompt.input_ids)
    assert max_answer_tokens(model.config, prompt) == 512 - T
    model.config.embedding_config.max_position_embeddings = T + 5
    assert max_answer_tokens(model.config, prompt) == 5
    model.config.text_config.max_position_embeddings = T
    with pytest.raises(ValueError, match=f"takes {T} tokens .* has room for {T}"):
        max_answer_tokens(model.config, prompt)

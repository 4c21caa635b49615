"""Whoever else is in the batch, an answer is what `generate` says alone; places are freed, limits hold."""

import queue
import random
import time

import pytest
import torch
from asking import until
from PIL import Image

from hovle_core.processor import Encoded
from hovle_core.testing import tiny_hovle
from hovle_serve import prefix
from hovle_serve.answer import Piece, StopStrings
from hovle_serve.batch import DecodeBatch
from hovle_serve.chat import ChatSession
from hovle_serve.engine import Engine, EngineClosedError, QueueFullError, Request
from hovle_serve.prefix import PrefixCache
from hovle_serve.sampling import Sampling

WAIT = 30


class Asked:
    """A request and what came of it so far."""

    def __init__(self, engine: Engine, prompt: Encoded, sampling: Sampling, **fields) -> None:
        self.pieces: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
        self.request = Request(prompt, sampling, self.pieces.put, **fields)
        engine.submit(self.request)

    def next(self) -> Piece:
        piece = self.pieces.get(timeout=WAIT)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def rest(self) -> list[Piece]:
        pieces = [self.next()]
        while pieces[-1].finish_reason is None:
            pieces.append(self.next())
        return pieces

    def text(self) -> str:
        return "".join(piece.text for piece in self.rest())


def slowed(model):
    """Steps take so long that an answer of hundreds of tokens does not end while this thread looks elsewhere."""
    return model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.02))


@pytest.fixture
def encode(processor):
    def encode(text: str, *sizes: tuple[int, int]) -> Encoded:
        images = [Image.new("RGB", size, (40 * i, 200, 90)) for i, size in enumerate(sizes)]
        parts = [*({"type": "image"} for _ in sizes), {"type": "text", "text": text}]
        return processor.encode([{"role": "user", "content": parts}], images, add_generation_prompt=True)

    return encode


@pytest.fixture
def silent_hd(model, processor):
    """A HoVLE-HD, whose blocks cache more tokens than the LLM."""
    hd = tiny_hovle(processor.tokenizer, pixel_shuffle_loc="post")
    hd.generation_config.suppress_tokens = model.generation_config.suppress_tokens
    return hd


@pytest.fixture(params=["pre", "post", "image_bidirectional"])
def laid_out(request, model, silent_hd):
    """A HoVLE, a HoVLE-HD, and one whose pictures see themselves whole."""
    if request.param == "image_bidirectional":
        model.config.embedding_config.mask_type = request.param
    return silent_hd if request.param == "post" else model


def generated(model, processor, prompt: Encoded, tokens: int) -> str:
    out = model.generate(**processor.batch([prompt]), max_new_tokens=tokens, do_sample=False)
    return processor.tokenizer.decode(out[0, len(prompt.input_ids) :], skip_special_tokens=True)


PROMPTS = [
    ("hi", []),
    ("what is this?", [(60, 60)]),
    ("and these two? " * 5, [(300, 60), (60, 200)]),
    ("a red square", []),
    ("blue", [(120, 60)]),
]


def test_an_answer_is_generates_whoever_joins_and_leaves(laid_out, processor, encode):
    lengths = [40, 3, 25, 12, 30]
    prompts = [encode(text, *sizes) for text, sizes in PROMPTS]
    expected = [generated(laid_out, processor, prompt, n) for prompt, n in zip(prompts, lengths, strict=True)]
    assert len(set(expected)) == len(expected)
    sizes = []
    laid_out.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["inputs_embeds"].shape[0]), with_kwargs=True
    )
    with Engine(laid_out, processor, max_batch=4) as engine:
        asked, said = [], []
        for prompt, n in zip(prompts, lengths, strict=True):
            asked.append(Asked(engine, prompt, Sampling(max_new_tokens=n)))
            said.append(asked[-1].next().text)  # the next one joins while this one is being answered
        answers = [first + rest.text() for first, rest in zip(said, asked, strict=True)]
        assert answers == expected
        until(lambda: engine.num_active == 0)
        assert engine.cached_tokens == 0
    assert max(sizes) > 1


def test_logprobs_are_the_models_and_do_not_depend_on_the_batch(model, processor, encode):
    prompt, n = encode("what is this?", (60, 60)), 12
    with Engine(model, processor) as engine:
        others = [Asked(engine, encode(text, *sizes), Sampling(max_new_tokens=60)) for text, sizes in PROMPTS]
        pieces = Asked(engine, prompt, Sampling(max_new_tokens=n), top_logprobs=3).rest()
        for other in others:
            other.request.cancel()
    tokens = [token for piece in pieces for token in piece.logprobs]
    ids = [token.token_id for token in tokens]
    inputs = processor.batch([prompt])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    del inputs["attention_mask"]
    with torch.no_grad():
        scores = model(**inputs).logits[0, -n - 1 : -1]
    scores[:, model.generation_config.suppress_tokens] = float("-inf")
    expected = scores.log_softmax(-1)
    assert len(ids) == n
    got = torch.tensor([token.logprob for token in tokens])
    torch.testing.assert_close(got, expected.gather(1, torch.tensor(ids)[:, None])[:, 0], atol=1e-4, rtol=0)
    for token, row in zip(tokens, expected, strict=True):
        assert [i for i, _ in token.top] == row.topk(3).indices.tolist()
        assert token.top[0] == (token.token_id, token.logprob)  # greedy


def test_a_seed_draws_the_same_alone_in_company_and_in_hovle_chat(model, processor, encode):
    sampling = Sampling(max_new_tokens=20, temperature=1.2, top_p=0.9, seed=7)
    prompt = processor.encode([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    expected = "".join(ChatSession(model, processor, sampling=sampling).ask("hi"))
    with Engine(model, processor) as engine:
        assert Asked(engine, prompt, sampling).text() == expected
        crowd = [Asked(engine, encode(text, *sizes), sampling) for text, sizes in PROMPTS]
        assert Asked(engine, prompt, sampling).text() == expected
        other = Sampling(max_new_tokens=20, temperature=1.2, top_p=0.9, seed=8)
        assert Asked(engine, prompt, other).text() != expected
        for one in crowd:
            one.rest()


def test_several_answers_to_one_prompt_read_it_once(model, processor, encode):
    prompt, tiles = encode("what is this?", (60, 60)), []
    model.embedding.patch_embed.register_forward_pre_hook(lambda _, args: tiles.append(len(args[0])))
    expected = generated(model, processor, prompt, 8)
    tiles.clear()
    heard: list[list[Piece]] = [[], [], []]
    with Engine(model, processor) as engine:
        engine.submit(*(Request(prompt, Sampling(max_new_tokens=8), pieces.append) for pieces in heard))
        until(lambda: all(pieces and pieces[-1].finish_reason for pieces in heard))
    assert tiles == [1]
    assert ["".join(piece.text for piece in pieces) for pieces in heard] == [expected] * 3


def test_what_prompts_begin_with_is_read_once_and_changes_no_answer(laid_out, processor, encode, monkeypatch):
    wide, red = (300, 60), (60, 60)
    prompts = [
        encode("what is this?", wide),
        encode("what colour has it?", wide),  # the same picture, another question
        encode("what is this?", wide, red),  # one more picture
        encode("what is this?", wide, (60, 200)),  # another one behind the first
        encode("what is this?", red),
        encode("what is this?", wide),  # all but the last token
        encode("what is this? " * 3, wide, red, red),
    ]
    # The first picture's tiles but the last one are the same here: the picture as a whole is not.
    other = encode("what is this?", wide)
    other.tiles = other.tiles.copy()
    other.tiles[-1] ^= 255
    prompts.append(other)
    expected = [generated(laid_out, processor, prompt, 10) for prompt in prompts]
    tiles, reused = [], []
    laid_out.embedding.patch_embed.register_forward_pre_hook(lambda _, args: tiles.append(len(args[0])))
    with Engine(laid_out, processor) as engine:
        for prompt, text in zip(prompts, expected, strict=True):
            before = engine.reused_tokens
            assert Asked(engine, prompt, Sampling(max_new_tokens=10)).text() == text
            reused.append(engine.reused_tokens - before)
    shared = int((prompts[0].input_ids == processor.image_token_id).sum())
    assert reused[0] == reused[4] == reused[7] == 0
    assert all(reused[i] > shared for i in (1, 2, 3))
    assert reused[5] == len(prompts[5].input_ids) - 1
    assert tiles == [5, 1, 4, 1, 1, 5]
    monkeypatch.setattr(prefix, "MAX_ENTRIES", 1)
    with Engine(laid_out, processor) as engine:
        for prompt in (prompts[0], prompts[4], prompts[5]):
            Asked(engine, prompt, Sampling(max_new_tokens=1)).text()
        assert engine.reused_tokens == 0  # each drove out the one before it
    with Engine(laid_out, processor, max_prefix_tokens=0) as engine:
        for prompt, text in zip(prompts[:2], expected[:2], strict=True):
            assert Asked(engine, prompt, Sampling(max_new_tokens=10)).text() == text
        assert engine.reused_tokens == 0


def test_what_is_new_in_prompts_that_come_together_is_read_in_one_forward(laid_out, processor, encode):
    red, wide = (60, 60), (300, 60)
    blue, what = "blue circle " * 6, "what is this? " * 3
    waves = [
        [encode(blue + "hi"), encode(what, red), encode("red", wide)],
        # Behind what is known of the first three: other words, another picture; and a prompt that is all new.
        [encode(blue + "and red?"), encode(what + "this?", red), encode("red", wide, red), encode("a", (60, 200))],
    ]  # fmt: skip
    expected = [[generated(laid_out, processor, prompt, 10) for prompt in wave] for wave in waves]
    read = []
    laid_out.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    with Engine(laid_out, processor) as engine:
        for prompts, texts in zip(waves, expected, strict=True):
            read.clear()
            assert together(engine, prompts, 10) == texts
            assert [rows for rows, tokens in read if tokens > 1] == [len(prompts)]
        assert engine.reused_tokens > 60


def together(engine: Engine, prompts: list[Encoded], tokens: int) -> list[str]:
    """Answers to prompts that are submitted at once."""
    heard: list[list[Piece]] = [[] for _ in prompts]
    sampling = Sampling(max_new_tokens=tokens)
    engine.submit(
        *(Request(prompt, sampling, pieces.append) for prompt, pieces in zip(prompts, heard, strict=True))
    )
    until(lambda: all(pieces and pieces[-1].finish_reason for pieces in heard))
    return ["".join(piece.text for piece in pieces) for pieces in heard]


def test_a_picture_that_two_ask_about_at_once_is_read_once(model, processor, encode):
    prompts = [encode(text, (300, 60)) for text in ("what is this?", "what colour has it?")]
    expected = [generated(model, processor, prompt, 6) for prompt in prompts]
    tiles = []
    model.embedding.patch_embed.register_forward_pre_hook(lambda _, args: tiles.append(len(args[0])))
    with Engine(model, processor) as engine:
        assert together(engine, prompts, 6) == expected
    assert tiles == [5]
    with Engine(model, processor, max_prefix_tokens=0) as engine:  # each for itself, in one forward
        assert together(engine, prompts, 6) == expected
    assert tiles == [5, 10]


def test_the_prefixes_kept_are_the_newest_and_within_their_budget(model, processor, encode):
    prompts = [encode(f"{word} " * 12) for word in ("red", "blue", "circle")]
    lengths = [len(prompt.input_ids) for prompt in prompts]
    prefixes = PrefixCache(model, processor, max(lengths[0] + lengths[1], lengths[1] + lengths[2]))
    with torch.inference_mode():
        for prompt in prompts:
            list(prefixes.read([prompt]))
        assert prefixes.num_tokens == lengths[1] + lengths[2]
        list(prefixes.read([prompts[1]]))
        assert prefixes.num_tokens == lengths[1] + lengths[2]  # kept once
        assert prefixes.reused_tokens == lengths[1] - 1
        list(prefixes.read([prompts[0]]))
        assert prefixes.reused_tokens == lengths[1] - 1


def test_why_an_answer_ends_and_how_many_tokens_it_took(model, processor, encode):
    whole = generated(model, processor, encode("hi"), 20)
    stop = whole[5:8]
    with Engine(model, processor) as engine:
        pieces = Asked(engine, encode("hi"), Sampling(max_new_tokens=20)).rest()
        assert ("".join(p.text for p in pieces), pieces[-1].finish_reason) == (whole, "length")
        assert [p.completion_tokens for p in pieces] == list(range(1, 21))
        pieces = Asked(engine, encode("hi"), Sampling(max_new_tokens=20), stop=("no such", stop)).rest()
        assert ("".join(p.text for p in pieces), pieces[-1].finish_reason) == (
            whole[: whole.index(stop)],
            "stop",
        )
        assert pieces[-1].completion_tokens < 20
    end = processor.tokenizer.convert_tokens_to_ids(processor.tokenizer.tokenize(whole))[4]
    model.generation_config.eos_token_id = [end]
    expected = generated(model, processor, encode("hi"), 20)
    assert len(expected) < len(whole)
    with Engine(model, processor) as engine:
        pieces = Asked(engine, encode("hi"), Sampling(max_new_tokens=20), top_logprobs=0).rest()
        text = "".join(p.text for p in pieces)
        assert whole.startswith(text)
        assert expected.startswith(text)  # which also spells the end token here, an ordinary one
        assert pieces[-1].finish_reason == "stop"
        tokens = [token for p in pieces for token in p.logprobs]
        assert pieces[-1].completion_tokens == len(tokens) + 1  # the end token counts


def test_stop_strings_hold_back_no_more_than_they_must():
    stops = StopStrings(["###", "ab"])
    assert [stops.push(text) for text in ("x#", "#y", "#", "a", "c")] == [
        ("x", False), ("##y", False), ("", False), ("#", False), ("ac", False)
    ]  # fmt: skip
    assert stops.push("one##") == ("one", False)
    assert stops.push("#two") == ("", True)
    assert stops.flush() == ""
    whole = StopStrings([])
    assert whole.push("ab") == ("ab", False)


def test_cancelling_frees_the_place_within_a_step(model, processor, encode):
    expected = generated(model, processor, encode("blue"), 4)
    slowed(model)
    with Engine(model, processor, max_batch=1) as engine:
        long = Asked(engine, encode("hi"), Sampling(max_new_tokens=400))
        next_one = Asked(engine, encode("blue"), Sampling(max_new_tokens=4))
        until(lambda: (engine.num_active, engine.num_waiting) == (1, 1))
        long.request.cancel()
        steps = engine.steps
        assert next_one.text() == expected
        assert engine.steps - steps <= 1 + 3  # the step in work, then the next one's own
        dead = Asked(engine, encode("hi"), Sampling(max_new_tokens=400))
        waiting = Asked(engine, encode("hi"), Sampling(max_new_tokens=400))
        until(lambda: (engine.num_active, engine.num_waiting) == (1, 1))
        waiting.request.cancel()
        until(lambda: engine.num_waiting == 0)
        assert waiting.pieces.empty()
        dead.request.cancel()
        until(lambda: engine.num_active == 0)


def test_the_cache_never_outgrows_its_budget_and_the_queue_is_in_order(model, processor, encode):
    short, long = encode("hi"), encode("hello " * 20)
    budget = 2 * (len(long.input_ids) + 10)
    seen = []
    with Engine(model, processor, max_batch=8, max_cache_tokens=budget) as engine:
        model.language_model.register_forward_hook(lambda *_: seen.append(engine.cached_tokens))
        ended: list[int] = []

        def ask(number: int, prompt: Encoded) -> Request:
            def deliver(piece):
                if piece.finish_reason:
                    ended.append(number)

            request = Request(prompt, Sampling(max_new_tokens=10), deliver)
            engine.submit(request)
            return request

        for number in range(6):
            ask(number, long if number % 2 else short)
        until(lambda: len(ended) == 6)
        assert ended == sorted(ended)
        assert 0 < max(seen) <= budget
        with pytest.raises(ValueError, match=f"max_tokens {budget} is more than the"):
            Asked(engine, short, Sampling(max_new_tokens=budget))
        with pytest.raises(ValueError, match="the cache has room for"):
            Asked(engine, encode("hello " * 80), Sampling(max_new_tokens=1))


def test_a_full_queue_takes_all_or_none(model, processor, encode):
    slowed(model)
    with Engine(model, processor, max_batch=1, max_queue=2) as engine:
        first = Asked(engine, encode("hi"), Sampling(max_new_tokens=400))
        until(lambda: engine.num_active == 1)
        heard = []
        pair = [Request(encode("hi"), Sampling(max_new_tokens=2), heard.append) for _ in range(3)]
        with pytest.raises(QueueFullError, match="the queue holds 2"):
            engine.submit(*pair)
        assert engine.num_waiting == 0
        engine.submit(*pair[:2])
        assert not engine.has_room()
        first.request.cancel()
        until(lambda: len(heard) == 4)


def test_what_fails_fails_its_own_request_or_step_and_the_rest_goes_on(
    model, processor, encode, monkeypatch, caplog
):
    expected = generated(model, processor, encode("hi"), 6)
    broken = encode("hi", (60, 60))
    broken.tiles = broken.tiles[:0]  # a bug of somebody's
    with Engine(model, processor) as engine:
        good = Asked(engine, encode("hi"), Sampling(max_new_tokens=6))
        with pytest.raises(ValueError, match="placeholders"):
            Asked(engine, broken, Sampling(max_new_tokens=6)).rest()
        assert good.text() == expected

        slow = slowed(model)  # or the rows end before they can fail
        rows = [Asked(engine, encode("hi"), Sampling(max_new_tokens=300)) for _ in range(2)]
        for row in rows:
            row.next()
        handle = model.language_model.register_forward_pre_hook(lambda *_: 1 / 0)
        for row in rows:
            with pytest.raises(ZeroDivisionError):
                row.rest()
        handle.remove()
        slow.remove()
        assert Asked(engine, encode("hi"), Sampling(max_new_tokens=6)).text() == expected

        monkeypatch.setattr(DecodeBatch, "join", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Asked(engine, encode("hi"), Sampling(max_new_tokens=6)).rest()
        monkeypatch.undo()
        assert Asked(engine, encode("hi"), Sampling(max_new_tokens=6)).text() == expected
    # Who runs the server learns why, with a traceback each.
    failures = [record for record in caplog.records if record.name == "hovle_serve.engine"]
    assert [record.exc_info[0] for record in failures] == [ValueError, ZeroDivisionError, ZeroDivisionError]


def test_closing_tells_who_still_waits(model, processor, encode):
    slowed(model)
    engine = Engine(model, processor, max_batch=1)
    asked = [Asked(engine, encode("hi"), Sampling(max_new_tokens=400)) for _ in range(2)]
    asked[0].next()
    engine.close()
    for one in asked:
        with pytest.raises(EngineClosedError):
            one.rest()
    assert not engine.is_running
    with pytest.raises(EngineClosedError):
        Asked(engine, encode("hi"), Sampling(max_new_tokens=4))


def test_random_requests_and_cancels_leave_nothing_behind(model, processor, encode):
    rng = random.Random(0)
    prompts = [encode(text, *sizes) for text, sizes in PROMPTS]
    with Engine(model, processor, max_batch=4, max_queue=100) as engine:
        asked = []
        for _ in range(60):
            asked.append(Asked(engine, rng.choice(prompts), Sampling(max_new_tokens=rng.randint(1, 12))))
            if rng.random() < 0.3:
                rng.choice(asked).request.cancel()
            if rng.random() < 0.2:
                time.sleep(0.005)
        for one in asked:
            if not one.request.is_cancelled:
                assert one.rest()[-1].completion_tokens == one.request.sampling.max_new_tokens
        until(lambda: engine.num_active == engine.num_waiting == 0)
        assert engine.cached_tokens == 0


def test_what_the_engine_does_not_do_is_refused(model, processor):
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(ValueError, match="generation_config.repetition_penalty is 1.2"):
        Engine(model, processor)
    model.generation_config.repetition_penalty = None
    model.config.text_config.sliding_window = 16
    model.config.text_config.layer_types = ["sliding_attention"] * 2
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        Engine(model, processor)
    model.config.text_config.layer_types = ["full_attention"] * 2
    model.embedding.recurrent_layers = [0]  # as of a token mixer with a state
    with pytest.raises(ValueError, match="keeps a state, and only keys and values are served in batches"):
        Engine(model, processor)

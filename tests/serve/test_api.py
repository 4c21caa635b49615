"""The API over a real socket, as the openai client and curl use it: what is answered, and to whom."""

import asyncio
import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import openai
import pytest
from asking import HI, NAME, ask, data_uri, until, with_pictures
from PIL import Image

from hovle_serve.answer import Piece, TokenLogprob
from hovle_serve.chat import ChatSession
from hovle_serve.completions import Completion
from hovle_serve.sampling import Sampling

# ---- what is answered ------------------------------------------------------------------------------------------------


def test_the_openai_client_hears_what_hovle_chat_says(serve, model, processor):
    client = serve().client()
    session = ChatSession(model, processor, system="be brief", sampling=Sampling(max_new_tokens=12))
    images = [Image.new("RGB", (80, 60), "red"), Image.new("RGB", (300, 60), "blue")]
    expected = ["".join(session.ask("what is this?", images)), "".join(session.ask("and now?"))]

    messages = [{"role": "system", "content": "be brief"}]
    messages += with_pictures("what is this?", data_uri(), data_uri((300, 60), "blue"))
    first = ask(client, messages)
    choice = first.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        expected[0],
        "length",
    )
    prompt = processor.encode(session.messages[:2], images, add_generation_prompt=True)
    assert first.usage.prompt_tokens == len(prompt.input_ids)
    assert (first.usage.completion_tokens, first.usage.total_tokens) == (12, len(prompt.input_ids) + 12)
    assert first.usage.prompt_tokens_details.image_tokens == 4 * len(prompt.tiles)
    assert (first.object, first.model) == ("chat.completion", NAME)
    assert choice.logprobs is None

    messages += [
        choice.message,
        {"role": "user", "content": "and now?"},
    ]  # the client's own object goes back in
    assert ask(client, messages).choices[0].message.content == expected[1]
    messages[-2] = choice.message.model_dump()  # null wherever OpenAI's have something
    assert ask(client, messages).choices[0].message.content == expected[1]


def test_a_picture_of_low_detail_is_one_tile(serve, model, processor):
    picture = data_uri((300, 60), "blue")
    [message] = with_pictures("what is this?", picture, picture)
    message["content"][1]["image_url"]["detail"] = "low"
    answer = ask(serve().client(), [message])
    wide = Image.new("RGB", (300, 60), "blue")
    tiles = [processor.tiles(wide), processor.image_processor.tiles(wide, (1, 1))]
    assert [len(t) for t in tiles] == [5, 1]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is this?"}]
    prompt = processor.encode([{"role": "user", "content": parts}], tiles, add_generation_prompt=True)
    assert answer.usage.prompt_tokens == len(prompt.input_ids)
    shapes = [(p["columns"], p["rows"], p["thumbnail"]) for p in answer.usage.prompt_tokens_details.images]
    assert shapes == [(4, 1, True), (1, 1, False)]
    inputs = processor.batch([prompt])
    new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.choices[0].message.content == processor.tokenizer.decode(new, skip_special_tokens=True)


def test_openais_other_fields_are_taken_where_they_ask_for_nothing(serve):
    client = serve().client()
    expected = ask(client).choices[0].message.content
    null = dict.fromkeys((
        "audio", "function_call", "functions", "logit_bias", "metadata", "modalities", "moderation",
        "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "reasoning_effort", "response_format", "safety_identifier", "service_tier", "store", "tool_choice", "tools",
        "verbosity", "web_search_options", "frequency_penalty", "presence_penalty", "user", "stop", "n",
    ))  # fmt: skip
    default = {
        "function_call": "none", "functions": [], "logit_bias": {}, "metadata": {}, "modalities": ["text"],
        "parallel_tool_calls": True, "prompt_cache_key": "a", "reasoning_effort": "medium",
        "response_format": {"type": "text"}, "safety_identifier": "a", "service_tier": "auto", "store": False,
        "tool_choice": "auto", "tools": [], "verbosity": "medium",
    }  # fmt: skip
    for fields in (null, default):
        assert ask(client, extra_body=fields).choices[0].message.content == expected
    messages = [
        HI[0] | {"name": None},
        {"role": "assistant", "content": "a", "tool_calls": [], "annotations": []},
    ]
    assert ask(client, [*messages, *HI], stream=True, stream_options={"include_obfuscation": False})


def test_models(serve):
    client = serve().client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "hovle"
    with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.3, "top_p": 0.9, "seed": 5, "n": 3},
        {"logprobs": True, "top_logprobs": 2, "n": 2},
        {"stop": ["e", "~~"], "temperature": 1.3, "seed": 1, "max_tokens": 60},
    ],
    ids=["greedy", "n seeds", "logprobs", "stop"],
)
def test_a_stream_is_the_same_answer(serve, fields):
    client = serve().client()
    messages = with_pictures("what is this?", data_uri())
    whole = ask(client, messages, **fields)
    chunks = list(ask(client, messages, stream=True, stream_options={"include_usage": True}, **fields))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.delta.role for c in mine] == ["assistant", *[None] * (len(mine) - 1)]
        assert [c.finish_reason for c in mine] == [*[None] * (len(mine) - 1), choice.finish_reason]
        tokens = [token for c in mine if c.logprobs for token in c.logprobs.content]
        assert [token.token for token in tokens] == [
            t.token for t in (choice.logprobs.content if choice.logprobs else [])
        ]
        if choice.logprobs:
            assert "".join(token.token for token in tokens) == choice.message.content
            for token, same in zip(tokens, choice.logprobs.content, strict=True):
                assert token.logprob == pytest.approx(same.logprob, abs=1e-4)
                assert len(token.top_logprobs) == 2
                assert bytes(token.bytes).decode() == token.token
    if "stop" in fields:
        assert whole.choices[0].finish_reason == "stop"
        assert "e" not in whole.choices[0].message.content
    if "seed" in fields and "n" in fields:
        assert len({choice.message.content for choice in whole.choices}) == 3
        alone = ask(client, messages, **fields | {"n": 1, "seed": 6})
        assert alone.choices[0].message.content == whole.choices[1].message.content


def test_a_token_is_spelled_once_however_often_it_is_likely():
    """A whole answer may list hundreds of thousands, and the event loop is everybody's."""
    decode = Mock(side_effect=lambda ids, **_: "".join("\ufffd" if i == 3 else f"<{i}>" for i in ids))
    tokenizer = Mock(decode=decode, convert_ids_to_tokens=Mock(side_effect="abc d".__getitem__))
    tokens = [TokenLogprob(i % 5, -1.0, ((i % 5, -1.0), (3, float("-inf")))) for i in range(1000)]

    async def pieces():
        for i, token in enumerate(tokens):
            yield 0, Piece("a", (token,), i + 1, "length" if i == 999 else None)

    completion = Completion("tiny", tokenizer, 1, 0, (), 1)
    content = asyncio.run(completion.whole(pieces()))["choices"][0]["logprobs"]["content"]
    spelled = sorted(call.args[0] for call in tokenizer.convert_ids_to_tokens.call_args_list)
    assert spelled == [0, 0, 1, 2, 3, 3, 4]  # once more as the first, where a tokenizer drops a space
    assert len(content) == 1000
    assert content[6] == {
        "token": "<1>", "logprob": -1.0, "bytes": list(b"<1>"),
        "top_logprobs": [
            {"token": "<1>", "logprob": -1.0, "bytes": list(b"<1>")},
            {"token": "\ufffd", "logprob": -9999.0, "bytes": None},
        ],
    }  # fmt: skip


def test_many_at_once_each_hear_their_own_answer(serve):
    server = serve(max_batch=4)
    questions = [with_pictures("word " * i, *[data_uri((60 * i, 60))] * (i % 3)) for i in range(1, 9)]

    def answer(i: int) -> str:
        response = ask(server.client(), questions[i], temperature=0 if i == 3 else 1.3, seed=i)
        return response.choices[0].message.content

    alone = [answer(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, range(8)))
    assert together == alone
    assert len(set(alone)) == 8


def test_a_system_message_and_a_picture_are_read_once(serve):
    server = serve()
    system = [{"role": "system", "content": "be brief " * 9}]
    wide = data_uri((300, 60))  # 5 tiles of 4 tokens
    for i, question in enumerate(("what is this?", "and what colour has it?")):
        usage = ask(server.client(), [*system, *with_pictures(question, wide)]).usage
        reused = float(
            re.search(r"^hovle_reused_prompt_tokens (\S+)", server.http.get("/metrics").text, re.M)[1]
        )
        assert usage.prompt_tokens_details.image_tokens == 20
        assert (20 + 9 < reused < usage.prompt_tokens) if i else reused == 0


def test_curl(serve, tmp_path):
    assert shutil.which("curl")
    server = serve()
    body = {"model": NAME, "messages": HI, "max_tokens": 3, "temperature": 0}
    expected = server.post(body | {"max_tokens": 3}).json()["choices"][0]["message"]["content"]
    command = ["curl", "-sSN", "--noproxy", "*", f"{server.url}/v1/chat/completions", "-H",
               "Content-Type: application/json", "-d", json.dumps(body | {"stream": True})]  # fmt: skip
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    events = [event.removeprefix("data: ") for event in out.strip().split("\n\n")]
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == expected


def test_health_and_metrics(serve):
    server = serve()
    assert server.http.get("/health").json() == {"status": "ok"}
    server.post({"max_tokens": 5})
    server.post(b"{")
    until(lambda: server.engine.num_active == 0)  # which is after the last token went out
    text = server.http.get("/metrics").text
    for line in (
        'hovle_responses_total{status="200"} 1.0',
        'hovle_responses_total{status="400"} 1.0',
        "hovle_completion_tokens_total 5.0",
        "hovle_time_to_first_token_seconds_count 1.0",
        "hovle_time_between_tokens_seconds_count 4.0",
        "hovle_active_requests 0.0",
        "hovle_waiting_requests 0.0",
    ):
        assert line in text.splitlines()
    server.engine.close()
    assert server.http.get("/health").status_code == 503
    response = server.post({})
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "1"
    assert response.json()["error"]["type"] == "server_error"


# ---- who may ask -----------------------------------------------------------------------------------------------------


def test_keys(serve):
    server = serve(api_keys=["first-key", "second-key"])
    for key in ("first-key", "second-key"):
        assert ask(server.client(api_key=key)).choices
    for key in ("first-kex", "first", "é"):
        response = server.post({}, headers={"Authorization": f"Bearer {key}".encode()})
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    for path in ("/v1/models", f"/v1/models/{NAME}", "/metrics"):
        assert server.http.get(path).status_code == 401
    assert server.post({}, headers={"Authorization": "Basic first-key"}).status_code == 401
    for path in ("/health", "/"):
        assert server.http.get(path).status_code == 200


def test_another_sites_page_cannot_post_here(serve):
    """Without a preflight a browser sends only form types and text/plain; no answer says that others may read it."""
    server = serve()
    body = json.dumps({"model": NAME, "messages": HI}).encode()
    response = server.post(body, headers={"Content-Type": "text/plain", "Origin": "http://evil.example"})
    assert response.status_code == 415
    preflight = server.http.options(
        "/v1/chat/completions",
        headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
    )
    assert preflight.status_code == 405
    for answer in (response, preflight, server.post({}, headers={"Origin": "http://evil.example"})):
        assert not any(name.startswith("access-control") for name in answer.headers)

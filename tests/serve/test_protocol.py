"""What a body costs to look at: pydantic collects whatever is wrong, and there may be millions of it."""

import json
import subprocess
import sys
from typing import Any

import pytest

from hovle_serve.protocol import MAX_PARTS, Limits, RequestError, parse_request

TEXT = {"type": "text", "text": "a"}
ZEROS = [0] * 400_000
FIELDS = {str(i): 0 for i in range(60_000)}


def raw(**fields: Any) -> bytes:
    return json.dumps({"model": "a", "messages": [{"role": "user", "content": "hi"}]} | fields).encode()


def said(content: Any, **fields: Any) -> bytes:
    return raw(messages=[{"role": "user", "content": content} | fields])


BODIES = {
    "2 MB of zeros": (said([0] * 700_000), None, "commas and brackets in the body, at most 500000"),
    "zeros for parts": (said(ZEROS), "messages", "400000 parts, at most 2080 are taken"),
    "zeros for messages": (raw(messages=ZEROS), "messages", "400000 messages, at most 256 are taken"),
    "zeros for stop": (raw(stop=ZEROS), "stop", "at most 4 items"),
    "zeros for modalities": (raw(modalities=ZEROS), "modalities", "at most 1 item"),
    "zeros for tools": (raw(tools=ZEROS), "tools", "cannot do that"),
    "fields": (raw(**FIELDS), None, "60002 fields, at most 64 are taken"),
    "fields of a message": (said("a", **FIELDS), "messages.0", "60002 fields, at most 64 are taken"),
    "fields of a part": (said([TEXT | FIELDS]), "messages.0.content.0", "60002 fields, at most 64 are taken"),
    "fields of a format": (raw(response_format=FIELDS), "response_format", "60000 fields, at most 64 are taken"),
    "fields of metadata": (raw(metadata=FIELDS), "metadata", "cannot do that"),
    # Within every limit, and all of it wrong.
    "wrong parts": (raw(messages=[{"role": "user", "content": [{**TEXT, **{str(i): 0 for i in range(60)}}] * 8}] * 99),
                    "messages.0.content.0.0", "unknown field"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_wrong_all_over_is_refused_by_the_first_of_it(name):
    body, param, message = BODIES[name]
    with pytest.raises(RequestError, match=message) as error:
        parse_request(body, Limits())
    assert (error.value.status, error.value.param) == (400, param)


PEAK = """
import re, sys
from hovle_serve.protocol import Limits, RequestError, parse_request

def peak():  # not ru_maxrss, which begins at the parent's
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024

bodies = [sys.stdin.buffer.read(int(size)) for size in sys.argv[1:]]
before = peak()
for body in bodies:
    try:
        parse_request(body, Limits())
    except RequestError:
        continue
    raise SystemExit("one was taken")
print(peak() - before)
"""


def test_bodies_that_are_wrong_all_over_cost_little_memory():
    bodies = [body for body, _, _ in BODIES.values()]
    found = subprocess.run(
        [sys.executable, "-c", PEAK, *(str(len(body)) for body in bodies)],
        input=b"".join(bodies),
        capture_output=True,
        check=True,
    )
    assert float(found.stdout) < 60  # MiB; a kilobyte for each zero of the smallest were more


def test_what_a_long_conversation_needs_is_taken():
    limits = Limits()
    turn = {"role": "user", "content": [TEXT] * (MAX_PARTS // limits.max_messages)}
    assert len(parse_request(raw(messages=[turn] * limits.max_messages), limits).messages) == 256
    text = ",[{" * (limits.max_characters // 3)  # as many as there may be
    assert parse_request(said(text), limits).messages[0].content == text


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"[]", "^an object is needed$"), (raw(messages={}), "^messages: an array is needed$"),
     (raw(metadata=[]), "^metadata: an object is needed$"), (raw(stream_options=1), "^stream_options: an object is")],
)  # fmt: skip
def test_what_is_needed_is_called_as_json_calls_it(body, message):
    with pytest.raises(RequestError, match=message):
        parse_request(body, Limits())


def test_the_last_of_two_equal_names_counts_as_everywhere():
    assert parse_request(raw(n=2)[:-1] + b',"n":3}', Limits()).n == 3

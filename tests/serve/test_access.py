"""Keys, and limits of each."""

import time

import pytest

from hovle_serve import access
from hovle_serve.access import Access, KeyLimits
from hovle_serve.protocol import RequestError
from hovle_serve.serving import read_api_keys


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_a_keys_requests_a_minute_come_back_with_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(access, "time", clock)
    gate = Access(["a", "b"], KeyLimits(max_requests_per_minute=6))
    a, b = gate.authorize("Bearer a"), gate.authorize("bearer  b")
    for _ in range(6):
        gate.enter(a)
        gate.leave(a)
    with pytest.raises(RequestError, match="6 requests a minute") as error:
        gate.enter(a)
    assert (error.value.status, error.value.headers) == (429, {"Retry-After": "10"})
    gate.enter(b)
    clock.now += 9.5
    with pytest.raises(RequestError):
        gate.enter(a)
    clock.now += 0.5
    gate.enter(a)
    with pytest.raises(RequestError):
        gate.enter(a)


def test_a_keys_requests_in_flight_are_counted_until_their_answers_end(serve, model):
    model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    server = serve(api_keys=["a", "b"], key_limits=KeyLimits(max_in_flight=1))

    def post(key: str, **fields):
        return server.post(fields, headers={"Authorization": f"Bearer {key}"})

    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 450, "stream": True}
    with server.client(api_key="a").chat.completions.create(model=server.name, **body) as stream:
        next(iter(stream))
        refused = post("a")
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert post("b").status_code == 200
    deadline = time.monotonic() + 60
    while post("a").status_code != 200:  # the hung-up stream's place is given back
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert [post("a", colour=1).status_code for _ in range(3)] == [400] * 3  # errors give theirs back too
    assert post("a").status_code == 200


def test_without_keys_there_are_no_limits():
    gate = Access((), KeyLimits(max_in_flight=1, max_requests_per_minute=1))
    for _ in range(3):
        gate.enter(gate.authorize(""))


def test_a_key_file_of_another_editor_and_what_is_none(tmp_path):
    (file := tmp_path / "keys").write_bytes("\ufeffa\r\nb\r\n".encode())
    assert read_api_keys(str(file)) == ["a", "b"]
    for contents, message in (("a".encode("utf-16"), "is not UTF-8"), (b"# none\n", "holds no key")):
        file.write_bytes(contents)
        with pytest.raises(ValueError, match=message):
            read_api_keys(str(file))
    for key in ("schlüssel", "a\tb"):  # a client may send the first as UTF-8 or as Latin-1
        file.write_text(f"# keys\n\n{key}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="line 3: a key has printable characters of ASCII"):
            read_api_keys(str(file))
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file or directory")):
        with pytest.raises(ValueError, match=f"^api_key_file '[^\n]*' cannot be read: {message}$"):
            read_api_keys(str(path))

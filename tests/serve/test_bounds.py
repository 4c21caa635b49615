"""What requests hold while they wait is bounded, and who holds much does not keep out who holds little."""

import asyncio
import base64
import io
import json
import socket
import threading
import weakref
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

import pytest
from asking import until
from PIL import Image

from hovle_core.image_processor import HovleImageProcessor
from hovle_core.processor import HovleProcessor
from hovle_serve import api, engine, front, prompts
from hovle_serve.access import Access
from hovle_serve.engine import Engine, QueueFullError, Request
from hovle_serve.gateway import create_gateway
from hovle_serve.protocol import Limits
from hovle_serve.relay import Relayed
from hovle_serve.sampling import Sampling

WAIT = 30
LARGE = 200_000  # bytes; two are more than all that a gateway of these tests may hold


# ---- bodies ----------------------------------------------------------------------------------------------------------


class Gateway:
    """A gateway that may hold one body of 300 kB; its replicas hear `begin` before they begin, and `end`."""

    def __init__(self, monkeypatch, stream: bool = False) -> None:
        monkeypatch.setattr(front, "MAX_BODIES", 1)
        self.app = create_gateway({"tiny": self._replicas}, Access(), Limits(max_body_bytes=300_000))
        self.stream, self.asked = stream, 0
        self.begin, self.end = asyncio.Event(), asyncio.Event()

    async def _replicas(self, request: Relayed) -> AsyncGenerator:
        large = len(request.body) > front.SMALL_BODY
        self.asked += large
        if large:
            await self.begin.wait()
        kind = b"text/event-stream" if self.stream else b"application/json"
        yield [{"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}]
        if large:
            await self.end.wait()
        yield [{"type": "http.response.body", "body": b"{}"}]

    async def ask(self, size: int = 0, begun: asyncio.Event | None = None) -> int:
        """The status. With `begun`: all but the last byte of the body comes, `begun` is set, nothing more comes."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a" * size}]}
        raw, statuses = json.dumps(body).encode(), []
        parts = iter([raw[:-1]] if begun else [raw[:-1], raw[-1:]])

        async def receive() -> dict:
            if (part := next(parts, None)) is not None:
                return {"type": "http.request", "body": part, "more_body": part != raw[-1:]}
            if begun:
                begun.set()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict) -> None:
            statuses.append(message.get("status"))

        headers = ((b"content-type", b"application/json"),)
        scope = Relayed("POST", "/v1/chat/completions", headers).scope()
        await asyncio.wait_for(self.app(scope, receive, send), WAIT)
        return statuses[0]


async def cancelled(*tasks: asyncio.Task) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_large_bodies_that_do_not_end_keep_out_large_ones_only(monkeypatch):
    async def scenario() -> None:
        gateway = Gateway(monkeypatch)
        gateway.begin.set()
        gateway.end.set()
        came = [asyncio.Event(), asyncio.Event()]
        large = asyncio.create_task(gateway.ask(299_800, came[0]))
        await came[0].wait()
        assert await gateway.ask(LARGE) == 429
        assert await gateway.ask(1000) == 200
        # Small ones have room of their own, which ends as well.
        monkeypatch.setattr(front, "MAX_PREPARED", 1)
        small = asyncio.create_task(gateway.ask(front.SMALL_BODY - 100, came[1]))
        await came[1].wait()
        assert await gateway.ask(1000) == 429
        await cancelled(large, small)
        assert await gateway.ask(LARGE) == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_body_counts_until_its_replica_begins_to_answer(monkeypatch, stream):
    async def scenario() -> None:
        gateway = Gateway(monkeypatch, stream)
        first = asyncio.create_task(gateway.ask(LARGE))
        while not gateway.asked:
            await asyncio.sleep(0.001)
        assert await gateway.ask(LARGE) == 429
        assert await gateway.ask(1000) == 200
        gateway.begin.set()
        if stream:  # nobody is asked again from here on: the body is gone
            second = asyncio.create_task(gateway.ask(LARGE))
            while gateway.asked < 2:
                if second.done() and second.result() == 429:  # the first answer has not begun yet
                    second = asyncio.create_task(gateway.ask(LARGE))
                await asyncio.sleep(0.001)
            assert not first.done()
        gateway.end.set()
        assert await first == 200
        if stream:
            assert await second == 200
        assert await gateway.ask(LARGE) == 200

    asyncio.run(asyncio.wait_for(scenario(), 2 * WAIT))


# ---- pictures --------------------------------------------------------------------------------------------------------


class Cutter:
    """Cuts pictures when it may. `came` requests with pictures have been looked at."""

    def __init__(self, monkeypatch) -> None:
        self.may, self._lock = threading.Event(), threading.Lock()
        self.came = self.cut = self.now = self.most = 0
        cut, has_pictures = HovleImageProcessor.tiles, api.has_pictures

        def tiles(processor, image, grid=None):
            with self._lock:
                self.cut += 1
                self.now += 1
                self.most = max(self.most, self.now)
            try:
                assert self.may.wait(2 * WAIT)
                return cut(processor, image, grid)
            finally:
                with self._lock:
                    self.now -= 1

        def counted(body) -> bool:
            found = has_pictures(body)
            self.came += found
            return found

        monkeypatch.setattr(HovleImageProcessor, "tiles", tiles)
        monkeypatch.setattr(api, "has_pictures", counted)


@pytest.fixture
def cutter(monkeypatch):
    cutter = Cutter(monkeypatch)
    yield cutter
    cutter.may.set()


@pytest.fixture
def pool(cutter):
    """Clients; when a test fails, they are let go first."""
    with ThreadPoolExecutor(8) as pool:
        yield pool
        cutter.may.set()


def with_picture(url: str | None = None) -> dict:
    if url is None:
        file = io.BytesIO()
        Image.new("RGB", (80, 60), "red").save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def hung_on(server) -> socket.socket:
    """A client that has asked about a picture, and does not read."""
    body = json.dumps({"model": server.name, "max_tokens": 1} | with_picture()).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=WAIT)
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    return connection


def test_a_text_is_tokenised_while_pictures_are_cut(serve, cutter, pool):
    server = serve()
    picture = pool.submit(server.post, with_picture())
    until(lambda: cutter.now)
    assert server.post({}).status_code == 200
    assert not picture.done()
    cutter.may.set()
    usage = picture.result(WAIT).json()["usage"]["prompt_tokens_details"]
    assert usage["image_tokens"] == 4
    assert usage["images"] == [{"width": 80, "height": 60, "columns": 1, "rows": 1, "thumbnail": False}]


def test_long_texts_are_tokenised_one_at_a_time_and_short_ones_beside_them(serve, pool, monkeypatch):
    """A tokenizer takes a second for the longest text, and the threads that requests are prepared in are few."""
    may, now, most, lock, encode = threading.Event(), [], [], threading.Lock(), HovleProcessor.encode

    def slow(processor, messages, *args, **kwargs):
        if len(str(messages)) > prompts.LONG_TEXT:
            with lock:
                now.append(processor)
                most.append(len(now))
            assert may.wait(2 * WAIT)
            with lock:
                now.pop()
        return encode(processor, messages, *args, **kwargs)

    monkeypatch.setattr(HovleProcessor, "encode", slow)
    monkeypatch.setattr(api, "MAX_LONG", 4)
    server = serve()
    long = {"messages": [{"role": "user", "content": "this is " * 3000}]}
    asked = [pool.submit(server.post, long) for _ in range(8)]
    try:
        until(lambda: now and sum(request.done() for request in asked) == 4)
        assert {request.result().status_code for request in asked if request.done()} == {429}
        assert server.post({}).status_code == 200
    finally:
        may.set()
    assert sorted(request.result(WAIT).status_code for request in asked)[4:] == [429] * 4
    assert max(most) == 1


@pytest.mark.parametrize(
    "body", ['{"model": "%s", "messages": [{"role": "user", "content": "a"}]}', '{"%s": 1}']
)
def test_an_error_repeats_little_of_what_was_sent(serve, body):
    """Escaped it would be five times as long, and stay until the client has read it."""
    response = serve().post((body % ("\x7f" * 100_000)).encode())
    assert response.status_code in (400, 404)
    assert len(response.content) < 2000


def test_pictures_that_wait_for_a_decoder_keep_out_pictures_only(serve, cutter, pool, monkeypatch):
    monkeypatch.setattr(api, "MAX_DECODERS", 1)
    monkeypatch.setattr(api, "MAX_PICTURED", 2)
    server = serve()
    pictures = [pool.submit(server.post, with_picture()) for _ in range(2)]
    until(lambda: cutter.came == 2)
    refused = server.post(with_picture())
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert server.post({}).status_code == 200
    cutter.may.set()
    assert [picture.result(WAIT).status_code for picture in pictures] == [200, 200]
    assert server.post(with_picture()).status_code == 200
    assert cutter.most == 1


def test_who_hangs_up_before_a_decoder_is_free_is_not_decoded(serve, cutter, pool, monkeypatch):
    monkeypatch.setattr(api, "MAX_DECODERS", 1)
    server = serve()
    picture = pool.submit(server.post, with_picture())
    until(lambda: cutter.now == 1)
    with hung_on(server):
        until(lambda: cutter.came == 2)
    until(lambda: 'hovle_responses_total{status="499"} 1.0' in server.http.get("/metrics").text)
    cutter.may.set()
    assert picture.result(WAIT).status_code == 200
    assert cutter.cut == 1


def test_who_hangs_up_while_decoding_has_the_decoder_until_it_is_done(serve, cutter, pool, monkeypatch):
    monkeypatch.setattr(api, "MAX_DECODERS", 1)
    server = serve()
    with hung_on(server):
        until(lambda: cutter.now == 1)
    picture = pool.submit(server.post, with_picture())
    until(lambda: cutter.came == 2)
    assert server.post({}).status_code == 200
    assert cutter.cut == 1
    cutter.may.set()
    assert picture.result(WAIT).status_code == 200
    until(lambda: 'hovle_responses_total{status="499"} 1.0' in server.http.get("/metrics").text)
    assert cutter.most == 1


class Host:
    """Gives pictures when it may."""

    def __init__(self) -> None:
        self.may, self.now, self.most = threading.Event(), 0, 0

    async def fetch_all(self, urls, max_bytes: int) -> dict[str, bytes]:
        self.now += 1
        self.most = max(self.most, self.now)
        while not self.may.is_set():
            await asyncio.sleep(0.005)
        self.now -= 1
        file = io.BytesIO()
        Image.new("RGB", (80, 60), "red").save(file, "PNG")
        return dict.fromkeys(urls, file.getvalue())


def test_few_requests_hold_fetched_pictures_and_nobody_else_waits_for_hosts(serve, cutter, pool, monkeypatch):
    monkeypatch.setattr(api, "MAX_FETCHERS", 1)
    cutter.may.set()
    server = serve(media=(host := Host()))
    try:
        linked = [pool.submit(server.post, with_picture("https://host/cat")) for _ in range(3)]
        until(lambda: cutter.came == 3)
        assert server.post(with_picture()).status_code == 200
        assert server.post({}).status_code == 200
        assert host.now == 1
    finally:
        host.may.set()
    assert [one.result(WAIT).status_code for one in linked] == [200] * 3
    assert host.most == 1


# ---- tiles -----------------------------------------------------------------------------------------------------------


def asked_about_a_picture(processor):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    return processor.encode(messages, [Image.new("RGB", (80, 60), "red")], add_generation_prompt=True)


def test_who_decodes_holds_no_tiles(model, processor):
    prompt, decoding, go_on = asked_about_a_picture(processor), threading.Event(), threading.Event()

    def pause(_, args, kwargs) -> None:
        if kwargs["inputs_embeds"].shape[1] == 1:
            decoding.set()
            assert go_on.wait(2 * WAIT)

    model.language_model.register_forward_pre_hook(pause, with_kwargs=True)
    prompt.tiles = prompt.tiles.copy()  # of one picture they are a view of something
    tiles, heard = weakref.ref(prompt.tiles), []
    with Engine(model, processor) as engine:
        request = Request(prompt, Sampling(max_new_tokens=4), heard.append)
        del prompt
        try:
            engine.submit(request)
            assert decoding.wait(WAIT)
            until(lambda: tiles() is None)  # neither the request nor the kept prefix has them
            assert engine.num_active == 1
        finally:
            go_on.set()
        until(lambda: heard and heard[-1].finish_reason)


def test_pictures_that_wait_are_bounded_by_their_bytes_and_texts_are_not(model, processor, monkeypatch):
    prompt, text = asked_about_a_picture(processor), processor.encode([{"role": "user", "content": "hi"}])
    monkeypatch.setattr(engine, "MAX_WAITING_TILE_BYTES", int(1.5 * prompt.tiles.nbytes))
    begun, go_on, heard = threading.Event(), threading.Event(), []

    def request(prompt, deliver=heard.append) -> Request:
        return Request(prompt, Sampling(max_new_tokens=2), deliver)

    def pause(*_) -> None:
        begun.set()
        assert go_on.wait(2 * WAIT)

    model.language_model.register_forward_pre_hook(pause)
    with Engine(model, processor, max_batch=1) as running:
        try:
            running.submit(request(text))
            assert begun.wait(WAIT)
            assert running.has_room(tile_bytes=2 * prompt.tiles.nbytes)  # one always may, or it never could
            running.submit(request(prompt), request(prompt))  # two answers about one picture
            assert not running.has_room(tile_bytes=prompt.tiles.nbytes)
            with pytest.raises(QueueFullError, match="of their pictures"):
                running.submit(request(asked_about_a_picture(processor)))
            running.submit(request(text))
            assert running.num_waiting == 3
        finally:
            go_on.set()
        until(lambda: sum(piece.finish_reason is not None for piece in heard) == 4)


def test_no_picture_is_decoded_for_a_queue_that_is_full_of_them(serve, cutter, monkeypatch):
    server = serve()
    cutter.may.set()
    full = server.engine.has_room
    monkeypatch.setattr(server.engine, "has_room", lambda n=1, tile_bytes=0: not tile_bytes and full(n))
    assert server.post(with_picture()).status_code == 429
    assert server.post({}).status_code == 200
    assert cutter.cut == 0


@pytest.mark.parametrize("stream", [False, True])
def test_nobody_holds_the_tiles_of_an_answer_in_work(serve, model, monkeypatch, stream):
    cut, refs, decoding, go_on = HovleImageProcessor.tiles, [], threading.Event(), threading.Event()

    def tiles(*arguments):
        found = cut(*arguments).copy()
        refs.append(weakref.ref(found))
        return found

    def pause(_, args, kwargs) -> None:
        if kwargs["inputs_embeds"].shape[1] == 1:
            decoding.set()
            assert go_on.wait(2 * WAIT)

    monkeypatch.setattr(HovleImageProcessor, "tiles", tiles)
    model.language_model.register_forward_pre_hook(pause, with_kwargs=True)
    server = serve()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, with_picture() | {"stream": stream})
        try:
            assert decoding.wait(WAIT)
            until(lambda: refs[0]() is None)
        finally:
            go_on.set()
        assert answer.result(WAIT).status_code == 200

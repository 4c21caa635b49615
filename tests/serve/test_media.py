"""Pictures by URL: fetched from listed hosts at public addresses only, each name looked up once, within caps."""

import asyncio
import gzip
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hovle_serve import media
from hovle_serve.media import FetchError, MediaFetcher, is_public_address

PICTURE = b"\x89PNG not really"


class Pictures(BaseHTTPRequestHandler):
    """Serves by path; keeps which Host was asked for what."""

    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.asked.append((self.headers["Host"], self.path))
        name, _, rest = self.path[1:].partition("/")
        if name == "to":  # a redirect
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
            return
        if name == "slow":
            time.sleep(1)
        if name == "missing":
            self.send_error(404)
            return
        body = gzip.compress(PICTURE) if name == "gzip" else PICTURE
        self.send_response(200)
        if name == "gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        for _ in range(100 if name == "large" else 1):
            self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        """Nothing."""


@pytest.fixture
def pictures() -> Iterator[ThreadingHTTPServer]:
    Pictures.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Names:
    """A name server that counts; the second time it says that every name is an address within."""

    def __init__(self, **names: str) -> None:
        self.names, self.asked = names, []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host not in self.names:
            raise OSError("no such name")
        return [self.names[host] if self.asked.count(host) == 1 else "10.0.0.1"]


def fetched(fetcher: MediaFetcher, *urls: str, max_bytes: int = 1000) -> list[bytes | str]:
    got = asyncio.run(fetcher.fetch_all(urls, max_bytes))
    return [str(got[url]) if isinstance(got[url], FetchError) else got[url] for url in urls]


def outside(address: str) -> bool:
    return address == "127.0.0.1"  # plays the internet


def test_a_listed_host_is_fetched_from_the_address_that_was_looked_up_once(pictures):
    names, at = Names(pictures="127.0.0.1"), f"http://pictures:{pictures.server_port}"
    fetcher = MediaFetcher([at], names, outside)
    assert fetched(fetcher, f"{at}/cat") == [PICTURE]
    assert names.asked == ["pictures"]
    assert Pictures.asked == [(f"pictures:{pictures.server_port}", "/cat")]
    # From now on the name points within: the next picture is refused, nothing is asked.
    assert "no public address" in fetched(fetcher, f"{at}/cat")[0]
    assert len(Pictures.asked) == 1
    assert "has no address" in fetched(MediaFetcher([at], Names(), outside), f"{at}/cat")[0]


def test_what_is_not_listed_is_never_asked(pictures):
    port = pictures.server_port
    names = Names(pictures="127.0.0.1", other="127.0.0.1")
    fetcher = MediaFetcher(["https://pictures", "*.example.com", f"http://pictures:{port}"], names, outside)
    for url in (
        f"http://other:{port}/cat",
        f"https://pictures:{port}/cat",  # another port than listed
        "http://pictures/cat",
        "https://example.com/cat",  # only what is below it
        "https://evilexample.com/cat",
        "ftp://pictures/cat",
        "file:///etc/passwd",
        f"//pictures:{port}/cat",
        "cat.png",
    ):
        assert "not among the hosts" in fetched(fetcher, url)[0], url
    assert "user's name" in fetched(fetcher, f"http://me:secret@pictures:{port}/cat")[0]
    assert "not a URL" in fetched(fetcher, "http://[::1/cat")[0]
    assert names.asked == []
    assert Pictures.asked == []


def test_a_redirect_is_looked_at_like_any_url(pictures):
    port = pictures.server_port
    a, b, within = (f"http://{name}:{port}" for name in ("a", "b", "within"))

    def get(path: str) -> bytes | str:
        names = Names(a="127.0.0.1", b="127.0.0.1", within="192.168.0.1")
        return fetched(MediaFetcher([a, b, within], names, outside), a + path)[0]

    assert get(f"/to/{b}/cat") == PICTURE
    assert Pictures.asked[-1] == (f"b:{port}", "/cat")
    assert "within is no public address" in get(f"/to/{within}/cat")
    assert "not among the hosts" in get("/to/http://169.254.169.254/latest/meta-data")
    assert "not among the hosts" in get("/to/file:///etc/passwd")
    assert "b is no public address" in get(f"/to/{b}/to/{b}/cat")  # looked up anew, and moved within
    addresses = dict.fromkeys("abcdef", "127.0.0.1")
    hosts = [f"http://{name}:{port}" for name in addresses]
    chain = "".join(f"{host}/to/" for host in hosts) + "end"
    assert "more than 3 redirects" in fetched(MediaFetcher(hosts, Names(**addresses), outside), chain)[0]


def test_time_bytes_and_answers_are_capped(pictures, monkeypatch):
    at = f"http://pictures:{pictures.server_port}"

    def get(*paths: str, **caps) -> list[bytes | str]:
        fetcher = MediaFetcher([at], Names(pictures="127.0.0.1"), outside)
        return fetched(fetcher, *(at + path for path in paths), **caps)

    assert "larger than 1000 bytes" in get("/large")[0]
    assert "answers 404" in get("/missing")[0]
    assert "compressed" in get("/gzip")[0]
    monkeypatch.setattr(media, "FETCH_SECONDS", 0.2)
    assert "within 0.2 seconds" in get("/slow")[0]
    monkeypatch.undo()

    async def always(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    urls = [f"{at}/{i}" for i in range(4)]  # together too large, and one of them twice
    got = fetched(MediaFetcher([at], always, outside), *urls, urls[0], max_bytes=3 * len(PICTURE))
    assert got.count(PICTURE) + sum("larger than" in str(one) for one in got) == 5
    assert len(set(urls) & {at + path for _, path in Pictures.asked}) == 4


def test_certificates_are_those_of_the_name(pictures, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=pictures", "-addext", "subjectAltName=DNS:pictures", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(certificate, key)
    pictures.socket = theirs.wrap_socket(pictures.socket, server_side=True)
    ours = ssl.create_default_context(cafile=str(certificate))
    port = pictures.server_port
    hosts = [f"https://pictures:{port}", f"https://other:{port}"]

    def get(host: str, tls: ssl.SSLContext | None) -> bytes | str:
        names = Names(pictures="127.0.0.1", other="127.0.0.1")
        return fetched(MediaFetcher(hosts, names, outside, tls), f"https://{host}:{port}/cat")[0]

    assert get("pictures", ours) == PICTURE
    assert "ConnectError" in get("other", ours)
    assert "ConnectError" in get("pictures", None)


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False), ("0.0.0.0", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False),
        ("240.0.0.1", False), ("::1", False), ("::", False), ("fe80::1%eth0", False), ("fc00::1", False),
        ("ff02::1", False), ("::ffff:127.0.0.1", False), ("::ffff:93.184.216.34", True), ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False), ("2001:0:0:0::1", False), ("2001:db8::1", False),
        ("fec0::1", False), ("3fff::1", False), ("192.88.99.1", False), ("::ffff:192.88.99.1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address, is_public):
    assert is_public_address(address) == is_public


@pytest.mark.parametrize(
    "host", ["a..example.org", "a" * 64 + ".example.org", "xn--a.example.org", "xn--a.org"]
)
def test_a_name_that_cannot_be_is_refused(host):
    """By the system's own look-up, and by what shows it."""
    [why] = fetched(MediaFetcher(["*.example.org"]), f"https://{host}/cat")
    assert re.search("has no address|not a URL|is not among the hosts", why)


@pytest.mark.parametrize(
    "entry", ["", "*", "a b", "https://", "example.com/path", "ftp://a", "a:b", "*.*.com"]
)
def test_what_is_no_host_is_refused(entry):
    with pytest.raises(ValueError, match="is no host"):
        MediaFetcher([entry])


def test_the_systems_look_up_refuses_this_machine(pictures):
    at = f"http://localhost:{pictures.server_port}"
    assert "localhost is no public address" in fetched(MediaFetcher([at]), f"{at}/cat")[0]
    at = f"http://127.0.0.1:{pictures.server_port}"
    assert "127.0.0.1 is no public address" in fetched(MediaFetcher([at]), f"{at}/cat")[0]
    assert Pictures.asked == []


def test_the_api_answers_about_pictures_it_fetched(serve, pictures, picture, monkeypatch):
    monkeypatch.setitem(globals(), "PICTURE", picture.read_bytes())
    at = f"http://pictures:{pictures.server_port}"

    async def always(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    server = serve(media=MediaFetcher([at], always, outside))

    def ask(*urls: str):
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return server.post({"messages": [{"role": "user", "content": parts}]})

    answer = ask(f"{at}/cat", f"{at}/cat").json()
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 8
    assert [image["width"] for image in answer["usage"]["prompt_tokens_details"]["images"]] == [80, 80]
    assert len(Pictures.asked) == 1
    error = ask("data:,", f"{at}/missing").json()["error"]
    assert error["param"] == "messages.0.content.0.image_url.url"
    error = ask(f"{at}/cat", f"{at}/missing").json()["error"]
    assert (error["param"], error["code"]) == ("messages.0.content.1.image_url.url", "image_not_fetched")
    error = ask("http://169.254.169.254/latest").json()["error"]
    assert "not among the hosts" in error["message"]
    before = len(Pictures.asked)
    assert "at most 32" in ask(*[f"{at}/{i}" for i in range(33)]).json()["error"]["message"]
    assert len(Pictures.asked) == before

"""Pictures by URL: only from hosts that the operator lists, from an address looked up once that is public.

The name is looked up here and the connection goes to that very address (a second look-up could say another one); a
redirect is a new URL, all of it checked again. No proxy or netrc of the environment is read, no cookie is kept.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

FETCH_SECONDS = 10.0  # for one picture, redirects and all
MAX_REDIRECTS = 3
MAX_FETCHES = 4  # of one request at a time
_PORTS = {"https": 443, "http": 80}
_NAT64 = ipaddress.ip_network("64:ff9b::/32")  # addresses that stand for IPv4 ones
# What Python 3.11 takes for the internet's: relays to 6to4, and documentation's (RFC 7526, RFC 9637).
_NOT_GLOBAL = (ipaddress.ip_network("192.88.99.0/24"), ipaddress.ip_network("3fff::/20"))
_ENTRY = re.compile(r"(?:(https?)://)?(\*\.)?([a-z0-9.-]+|\[[0-9a-f:]+\])(?::(\d{1,5}))?", re.ASCII)

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class FetchError(ValueError):
    """A picture that is not fetched, and why."""


@dataclass(frozen=True)
class _Host:
    scheme: str
    name: str
    port: int
    with_subdomains: bool

    def matches(self, url: httpx.URL) -> bool:
        if (url.scheme, url.port or _PORTS[url.scheme]) != (self.scheme, self.port):
            return False
        name = _name(url)
        return name.endswith("." + self.name) if self.with_subdomains else name == self.name


class MediaFetcher:
    """Fetches from `hosts`: `images.example.com` (by https, on its usual port), `*.example.com` (every host below), or
    with scheme and port, as `http://images.example.com:8080`. Raises ValueError for what is no host.

    resolve, is_public, tls: how names become addresses, which may be talked to, and who may sign; tests set them.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        resolve: Resolve | None = None,
        is_public: Callable[[str], bool] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts = [parsed_host(host) for host in hosts]
        self._resolve = resolve or _Resolver()
        self._is_public = is_public or is_public_address
        self._tls = tls or ssl.create_default_context()

    async def fetch_all(self, urls: Sequence[str], max_bytes: int) -> dict[str, bytes | FetchError]:
        """What each URL holds, or why not; of more than `max_bytes` together nothing more is read."""
        running, read = asyncio.Semaphore(MAX_FETCHES), _Budget(max_bytes)

        async def one(url: str) -> bytes | FetchError:
            async with running:
                try:
                    async with asyncio.timeout(FETCH_SECONDS):
                        return await self._fetch(url, read)
                except TimeoutError:
                    return FetchError(f"not fetched within {FETCH_SECONDS:g} seconds")
                except httpx.HTTPError as error:
                    return FetchError(f"cannot be fetched: {type(error).__name__}")
                except FetchError as error:
                    return error

        different = list(dict.fromkeys(urls))
        return dict(zip(different, await asyncio.gather(*map(one, different)), strict=True))

    async def _fetch(self, text: str, read: "_Budget") -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            url = self._checked(text)
            address = await self._address(url)
            headers = {"Host": url.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"}
            async with (
                httpx.AsyncClient(trust_env=False, verify=self._tls, timeout=FETCH_SECONDS) as client,
                client.stream(
                    "GET",
                    url.copy_with(host=address),
                    headers=headers,
                    extensions={"sni_hostname": _name(url)},
                ) as response,
            ):
                if response.has_redirect_location:
                    text = str(url.join(response.headers["location"]))
                    continue
                if response.status_code != 200:
                    raise FetchError(f"cannot be fetched: its server answers {response.status_code}")
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise FetchError("cannot be fetched: it comes compressed, which was not asked for")
                chunks = []
                async for chunk in response.aiter_raw():
                    read.take(len(chunk))
                    chunks.append(chunk)
                return b"".join(chunks)
        raise FetchError(f"cannot be fetched: more than {MAX_REDIRECTS} redirects")

    def _checked(self, text: str) -> httpx.URL:
        try:
            url = httpx.URL(text)
            allowed = url.scheme in _PORTS and any(host.matches(url) for host in self._hosts)
        except (httpx.InvalidURL, ValueError) as error:
            raise FetchError(f"not a URL: {error}") from error
        if not allowed:
            where = f"{url.scheme}://{_name(url)}" + (f":{url.port}" if url.port else "")
            raise FetchError(f"{where} is not among the hosts that this server fetches from")
        if url.userinfo:
            raise FetchError("a URL with a user's name or password is not fetched")
        return url

    async def _address(self, url: httpx.URL) -> str:
        try:
            addresses = await self._resolve(_name(url), url.port or _PORTS[url.scheme])
        except (OSError, UnicodeError) as error:  # the second of names with an empty or endless part
            raise FetchError(f"cannot be fetched: {_name(url)} has no address") from error
        if not addresses or not all(self._is_public(address) for address in addresses):
            raise FetchError(f"not fetched: {_name(url)} is no public address")
        return addresses[0]


class _Budget:
    def __init__(self, num_bytes: int) -> None:
        self.num_bytes, self.left = num_bytes, num_bytes

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise FetchError(f"the pictures of this request are larger than {self.num_bytes} bytes together")


class _Resolver:
    """The system's look-up, in threads of its own: a name server that hangs holds up nothing but other look-ups."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_FETCHES, "hovle-resolve")

    async def __call__(self, host: str, port: int) -> list[str]:
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(address[4][0]) for address in found]


def is_public_address(text: str) -> bool:
    """Whether an address is one of the internet's: not private, loopback, link-local (clouds' metadata), multicast, or
    an IPv6 form of such a one."""
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = ipaddress.ip_address(
        text.partition("%")[0]
    )
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64 or address.teredo is not None or address.is_site_local:
            return False
        address = address.ipv4_mapped or address.sixtofour or address
    assert address is not None
    listed = any(address in network for network in _NOT_GLOBAL)
    return address.is_global and not (address.is_multicast or address.is_reserved or listed)


def _name(url: httpx.URL) -> str:
    """The host as it is looked up: ASCII, lower case, an IPv6 address without brackets."""
    return url.raw_host.decode("ascii").lower().rstrip(".")


def parsed_host(entry: str) -> _Host:
    """An entry of the allow-list. Raises ValueError."""
    found = _ENTRY.fullmatch(entry.strip().lower())
    if found is None:
        raise ValueError(
            f"image_hosts: {entry!r} is no host; write images.example.com, *.example.com or http://host:port"
        )
    scheme = found[1] or "https"
    return _Host(
        scheme, found[3].strip("[]").rstrip("."), int(found[4] or _PORTS[scheme]), found[2] is not None
    )

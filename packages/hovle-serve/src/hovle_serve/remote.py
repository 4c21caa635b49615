"""A conversation with a server that speaks OpenAI's API."""

import base64
import io
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import httpx
from PIL.Image import Image

from hovle_core.rendering import Message
from hovle_serve.conversation import Conversation

# A first token may wait for a whole queue; a server that cannot be reached is told soon.
_TIMEOUT = httpx.Timeout(300, connect=10)


class _NotLetInError(ValueError):
    """The server wants a key, or another one."""


class RemoteSession(Conversation):
    """Talks to the first model of `url`. `sampling` are fields of a request (max_tokens, temperature, ...).

    Raises ValueError if the server cannot be reached or does not let us in.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        system: str | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.url, self.sampling = url, dict(sampling or {})
        key = (api_key or "").strip()
        if not (key.isascii() and key.isprintable()):  # the key itself is for no log
            raise ValueError(
                "HOVLE_API_KEY holds characters that no key has: printable ones of ASCII are needed"
            )
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._http = httpx.Client(
                base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=_TIMEOUT
            )
            response = self._http.get("/v1/models")
            if response.status_code == httpx.codes.UNAUTHORIZED:
                raise _NotLetInError(
                    f"{url} takes no one without a valid key: set HOVLE_API_KEY to one of its keys"
                )
            _check(response)
            self.model = str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError) as error:
            raise ValueError(f"cannot talk to --url {url!r}: {error}") from error
        except _NotLetInError:
            raise
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"--url {url!r} is no server with a model: {error}") from error
        super().__init__(system)

    def _answer(self, messages: Sequence[Message], images: Sequence[Image]) -> Generator[str, None, None]:
        pictures = iter(images)
        body = {
            **self.sampling,
            "model": self.model,
            "stream": True,
            "messages": [
                {**message, "content": _content(message["content"], pictures)} for message in messages
            ],
        }
        return self._pieces(body)

    def _pieces(self, body: dict[str, Any]) -> Generator[str, None, None]:
        """Closing it hangs up, which stops the answer."""
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                _check(response)
                for line in response.iter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    event = json.loads(data)
                    if "error" in event:
                        raise ValueError(f"the server says: {event['error']['message']}")
                    for choice in event["choices"]:
                        if text := choice["delta"].get("content"):
                            yield text
        except httpx.HTTPError as error:
            raise ValueError(f"the connection to {self.url} failed: {error}") from error
        raise ValueError(f"{self.url} broke off in the middle of an answer")


def _content(content: Any, pictures: Iterator[Image]) -> Any:
    """Our parts -> OpenAI's; a picture becomes a PNG, which loses nothing."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part["type"] == "image":
            file = io.BytesIO()
            next(pictures).save(file, "PNG")
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            parts.append({"type": "image_url", "image_url": {"url": url}})
        else:
            parts.append(part)
    return parts


def _check(response: httpx.Response) -> None:
    """Raise ValueError with the server's own words unless it says yes."""
    if response.is_success:
        return
    response.read()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = f"{response.status_code} {response.reason_phrase}"
    raise ValueError(f"the server says: {message}")

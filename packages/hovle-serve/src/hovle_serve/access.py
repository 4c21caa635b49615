"""Who may ask, and how much at a time: API keys, and limits of each."""

import hashlib
import hmac
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from hovle_serve.protocol import RequestError, Strict


class KeyLimits(Strict):
    """Of each API key, in each process that looks at keys; None is no limit. A minute's requests may come at once."""

    max_in_flight: int | None = Field(None, ge=1)
    max_requests_per_minute: int | None = Field(None, ge=1)


@dataclass
class _Use:
    allowance: float  # requests that may come now
    updated: float
    in_flight: int = 0


class Access:
    """Without keys everybody may ask, and no limits hold."""

    def __init__(self, api_keys: Sequence[str] = (), limits: KeyLimits | None = None) -> None:
        self._keys = [_digest(key) for key in api_keys]
        self._limits = limits or KeyLimits()
        burst = self._limits.max_requests_per_minute or 0
        self._uses = {key: _Use(burst, time.monotonic()) for key in self._keys}

    @property
    def is_open(self) -> bool:
        return not self._keys

    def authorize(self, header: str) -> bytes | None:
        """Whose an `Authorization` header is. Raises RequestError (401).

        Compares digests, all of them, in a time that says nothing about the keys.
        """
        if not self._keys:
            return None
        scheme, _, key = header.partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise RequestError(
                401, "a valid API key is needed: Authorization: Bearer ...", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return given

    def enter(self, key: bytes | None) -> None:
        """A request begins, to be ended with `leave`. Raises RequestError (429) where it is one too many."""
        if key is None:
            return
        use, limits, now = self._uses[key], self._limits, time.monotonic()
        if limits.max_in_flight is not None and use.in_flight >= limits.max_in_flight:
            raise _limited(
                f"this key has {use.in_flight} requests in work, which is as many as it may have", 1
            )
        if (rate := limits.max_requests_per_minute) is not None:
            use.allowance = min(rate, use.allowance + (now - use.updated) * rate / 60)
            use.updated = now
            if use.allowance < 1:
                wait = math.ceil((1 - use.allowance) * 60 / rate)
                raise _limited(f"this key may send {rate} requests a minute", wait)
            use.allowance -= 1
        use.in_flight += 1

    def leave(self, key: bytes | None) -> None:
        if key is not None:
            self._uses[key].in_flight -= 1


def _limited(message: str, seconds: int) -> RequestError:
    return RequestError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

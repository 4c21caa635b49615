"""The one record type: pictures, text, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Message = Mapping[str, Any]
"""{"role": "user", "content": "text"} or content as parts: {"type": "image"} / {"type": "text", "text": "..."}."""

Kind = Literal["image", "text", "pair", "conversation"]
ROLES = ("system", "user", "assistant")


class BadSample(ValueError):
    """One record that cannot be used. Recorded by the `Ledger` and skipped; never replaced by another record.

    reason: what is wrong, as "category" or "category: details". The ledger counts categories, so details that
    differ from record to record (numbers, names) belong after the first colon.
    further: what else is wrong with it, which `hovle data validate` tells, too.
    """

    def __init__(self, key: str, source: str, reason: str, further: tuple[str, ...] = ()) -> None:
        super().__init__(key, source, reason, further)  # all of them, so that it pickles
        self.key = key
        self.source = source
        self.reason = reason
        self.further = further

    @property
    def category(self) -> str:
        return self.reason.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.source or 'sample'}: {self.key or '(no key)'}: {self.reason}"


@dataclass(frozen=True)
class Sample:
    """One record as it lies in a shard: encoded picture files and text, nothing decoded.

    images: encoded files (PNG, JPEG, ...), in the order of the {"type": "image"} parts of `messages`.
    """

    key: str
    images: tuple[bytes, ...] = ()
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """The kind of record by what it holds; a conversation may have any number of images, also none."""
        if self.messages is not None:
            return "conversation"
        if self.text is not None:
            return "pair" if self.images else "text"
        return "image"

    def validate(self, source: str = "") -> Sample:
        """Return self, or raise `BadSample` (naming `source`) for a record no stream could use."""
        reason = self._problem()
        if reason is not None:
            raise BadSample(self.key, source, reason)
        return self

    def _problem(self) -> str | None:
        if not self.key:
            return "no key"
        if self.messages is not None:
            if self.text is not None:
                return "both text and messages"
            return _messages_problem(self.messages, len(self.images))
        if self.text is not None:
            if not isinstance(self.text, str):
                return f"text is no string: {type(self.text).__name__}"
            return _text_problem(self.text) if self.text.strip() else "empty text"
        return None if self.images else "no content"


def _messages_problem(messages: tuple[Message, ...], num_images: int) -> str | None:
    if not messages:
        return "no content"
    num_tags = 0
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or "content" not in message:
            return f"message without content: number {position}"
        if message.get("role") not in ROLES:
            return (
                f"unknown role: {message.get('role')!r} in message {position}, known are {', '.join(ROLES)}"
            )
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list | tuple):
            return f"message content is neither string nor parts: number {position}"
        for part in content:
            type_ = part.get("type") if isinstance(part, Mapping) else None
            if type_ == "image":
                num_tags += 1
            elif type_ != "text" or not isinstance(part.get("text"), str):
                return f"unknown message part: {str(part)[:80]} in message {position}"
            elif (problem := _text_problem(part["text"])) is not None:
                return problem
    if num_tags != num_images:
        return f"image tags and images differ: {num_tags} tags, {num_images} images"
    return None


def _text_problem(text: str) -> str | None:
    """JSON can hold halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"text is not Unicode: {error}"
    return None

"""One row of an annotation file -> names of pictures and text or messages. The formats differ in spelling only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hovle_data.schema import BadSample

IMAGE_TAG = "<image>"
ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip


class Row(NamedTuple):
    """What a row says. images: names as they stand in it, None where the row does not speak of pictures."""

    images: tuple[Any, ...] | None
    text: str | None
    messages: tuple[dict[str, Any], ...] | None
    id: str | None


def parse_row(row: Any, key: str, where: str) -> Row:
    """{"id", "image" | "images", "conversations" | "messages" | "text" | "caption"} -> Row.

    Raises `BadSample` for what is none of these.
    """
    if not isinstance(row, Mapping):
        raise BadSample(key, where, f"bad json: {type(row).__name__} where an object belongs")
    if row.get("video"):
        raise BadSample(key, where, "videos are not read: extract frames and list them as images")
    images = row.get("image") if row.get("image") is not None else row.get("images")
    if images is not None:
        images = tuple(images) if isinstance(images, list) else (images,) if images != "" else ()
    name = None if row.get("id") is None else str(row["id"])
    talk = row.get("conversations") if row.get("conversations") is not None else row.get("messages")
    if talk is not None:
        return Row(images, None, _messages(talk, images, key, where), name)
    text = row.get("text") if row.get("text") is not None else row.get("caption")
    if text is not None and not isinstance(text, str):
        raise BadSample(key, where, f"text is no string: {type(text).__name__}")
    return Row(images, text, None, name)


def _messages(talk: Any, images: tuple[Any, ...] | None, key: str, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(talk, list):
        raise BadSample(key, where, f"bad conversation: {type(talk).__name__} where a list belongs")
    turns = []
    for number, turn in enumerate(talk):
        if not isinstance(turn, Mapping):
            raise BadSample(key, where, f"bad conversation: turn {number} is {type(turn).__name__}")
        role = turn.get("from") if "from" in turn else turn.get("role")
        content = turn.get("value") if "value" in turn else turn.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise BadSample(
                key, where, f"unknown role: {role!r} in turn {number}, known are {', '.join(ROLES)}"
            )
        if isinstance(content, str | list):  # a list: parts already, as transformers writes them
            turns.append({"role": ROLES[role], "content": content})
        else:
            raise BadSample(key, where, f"turn without text: number {number}")
    if images is not None and len(images) == 1:
        _supply_tag(turns)
    return tuple({**turn, "content": split_tags(turn["content"])} for turn in turns)


def _supply_tag(turns: list[dict[str, Any]]) -> None:
    """One picture and no tag: it stands in front of the first question, as InternVL's own loader has it."""
    if any(IMAGE_TAG in str(turn["content"]) or isinstance(turn["content"], list) for turn in turns):
        return
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = f"{IMAGE_TAG}\n{turn['content']}"
            return


def split_tags(content: Any) -> Any:
    """Text with <image> tags -> parts; text without stays text. Line breaks beside a tag are the template's affair."""
    if not isinstance(content, str) or IMAGE_TAG not in content:
        return content
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(content.split(IMAGE_TAG)):
        if number:
            parts.append({"type": "image"})
        if piece := piece.strip("\n"):
            parts.append({"type": "text", "text": piece})
    return parts

"""One sample as members of a tar, there and back: K.json and its pictures K.0.png, K.1.jpg, ...

K.json is {"text" | "messages", "images": count, "meta"}. Of anyone's tars K.txt and any pictures are read too, also
beside a K.json that has neither text nor messages, as img2dataset writes them. Members of other kinds (.cls, .npy,
.pyd, ...) are not looked at: nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
from typing import Any

from hovle_data.decode import image_suffix
from hovle_data.schema import BadSample, Sample

MAX_KEY_BYTES = 80  # a ustar name holds 100 bytes: key, number of the picture, suffix
IMAGE_SUFFIXES = frozenset(
    {"png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "avif"}
)


def to_fields(sample: Sample) -> dict[str, str | bytes]:
    """Sample -> what webdataset writes: {"__key__": key, "json": ..., "0.png": ...}.

    Raises `BadSample` for a record that no stream could use, a key that webdataset would cut (dot, slash) and a
    picture of unknown format.
    """
    key = sample.key
    if not key or set(key) & set("./\\\0\n") or len(key.encode()) > MAX_KEY_BYTES:
        raise BadSample(
            key, "", f"bad key: {key!r} must be 1..{MAX_KEY_BYTES} bytes without dot, slash or line break"
        )
    sample.validate()
    record: dict[str, Any] = {}
    if sample.text is not None:
        record["text"] = sample.text
    if sample.messages is not None:
        record["messages"] = list(sample.messages)
    record["images"] = len(sample.images)  # so that a lost picture is noticed
    if sample.meta:
        record["meta"] = dict(sample.meta)
    try:
        fields: dict[str, str | bytes] = {
            "__key__": key,
            "json": json.dumps(record, ensure_ascii=False).encode(),
        }
    except (TypeError, ValueError) as error:
        raise BadSample(key, "", f"does not fit into json: {error}") from error
    for number, image in enumerate(sample.images):
        suffix = image_suffix(image)
        if suffix is None:
            raise BadSample(key, "", f"not a known image format: image {number} starts with {image[:8]!r}")
        fields[f"{number}.{suffix}"] = image
    return fields


def from_fields(key: str, source: str, fields: dict[str, bytes]) -> Sample:
    """Members by field name -> Sample, without decoding pictures; not validated beyond what that needs.

    Raises `BadSample` (key, source, reason) for JSON or text that does not read, and for a lost picture.
    """
    record: Any = {}
    if "json" in fields:
        try:
            record = json.loads(_decoded("json", key, source, fields))
        except BadSample:
            raise
        except (ValueError, RecursionError) as error:
            raise BadSample(key, source, f"bad json: {error}") from error
        if not isinstance(record, dict):
            raise BadSample(key, source, f"bad json: {type(record).__name__} where an object belongs")
    text = record.get("text")
    if text is None and record.get("messages") is None and "txt" in fields:
        text = _decoded("txt", key, source, fields)
    pictures = sorted((f for f in fields if f.rpartition(".")[2].lower() in IMAGE_SUFFIXES), key=_natural)
    count = record.get("images")
    if isinstance(count, int) and count != len(pictures):
        raise BadSample(key, source, f"missing image: {len(pictures)} of {count} are in the shard")
    messages = record.get("messages")
    if messages is not None and not isinstance(messages, list):
        raise BadSample(key, source, f"bad json: messages is {type(messages).__name__} where a list belongs")
    meta = record.get("meta")
    if meta is not None and not isinstance(meta, dict):
        raise BadSample(key, source, f"bad json: meta is {type(meta).__name__} where an object belongs")
    return Sample(
        key=key,
        images=tuple(fields[picture] for picture in pictures),
        text=text,
        messages=None if messages is None else tuple(messages),
        meta=meta or {},
    )


def _decoded(field: str, key: str, source: str, fields: dict[str, bytes]) -> str:
    try:
        return fields[field].decode("utf-8-sig")  # without the byte order mark that some editors write
    except UnicodeDecodeError as error:
        raise BadSample(key, source, f"{field} is not UTF-8: {error}") from error


def _natural(name: str) -> list[tuple[int, str]]:
    """0.png, 2.png, 10.png in the order of a person."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

"""One sample as members of a tar, there and back: K.json and its pictures K.0.png, K.1.jpg, ...

K.json is {"text" | "messages", "images": count, "meta"}. Of anyone's tars any pictures are read too, and where such a
K.json has neither text nor messages its `conversations` (LLaVA), else K.txt, else its `caption` (img2dataset). Members
of other kinds (.cls, .npy, .pyd, ...) are not looked at: nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
from typing import Any

from hovle_data.decode import image_suffix
from hovle_data.schema import BadSample, Sample
from hovle_data.sources.rows import parse_row

MAX_KEY_BYTES = 80  # a ustar name holds 100 bytes: key, number of the picture, suffix
IMAGE_SUFFIXES = frozenset(
    {"png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "avif"}
)
UNREAD_SUFFIXES = (
    frozenset(  # pictures and videos that nothing here decodes: to leave them out would change the sample
        {"heic", "heif", "jp2", "j2k", "jxl", "svg", "psd", "tga", "ico", "dng", "cr2", "nef", "arw"}
        | {"mp4", "webm", "mov", "avi", "mkv", "m4v"}
    )
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
    if unread := sorted(f for f in fields if suffix_of(f) in UNREAD_SUFFIXES):
        raise BadSample(key, source, f"format is not read: {key}.{unread[0]}")
    pictures = sorted((f for f in fields if suffix_of(f) in IMAGE_SUFFIXES), key=_natural)
    text, messages = record.get("text"), record.get("messages")
    if text is None and messages is None:
        if record.get("conversations") is not None:
            row = {"conversations": record["conversations"], "images": pictures}
            messages = list(parse_row(row, key, source).messages or ())
        else:
            text = _decoded("txt", key, source, fields) if "txt" in fields else record.get("caption")
    count = record.get("images")
    if isinstance(count, int) and count != len(pictures):
        raise BadSample(key, source, f"missing image: {len(pictures)} of {count} are in the shard")
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


def suffix_of(name: str) -> str:
    """What follows the last dot of a name, in small letters; webdataset's fields may have none."""
    return name.rpartition(".")[2].lower()


def _decoded(field: str, key: str, source: str, fields: dict[str, bytes]) -> str:
    try:
        return fields[field].decode("utf-8-sig")  # without the byte order mark that some editors write
    except UnicodeDecodeError as error:
        raise BadSample(key, source, f"{field} is not UTF-8: {error}") from error


def _natural(name: str) -> list[tuple[int, str]]:
    """0.png, 2.png, 10.png in the order of a person."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

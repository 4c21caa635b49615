"""Coverage-guided fuzzing of all that reads strangers' bytes; run by hand, for atheris is 35 MB and no test needs it.

    pip install atheris && python tests/data/atheris_bytes.py -runs=200000 -max_len=4096

The first byte says which reader gets the rest. Any exception but the named ones is a crash; libFuzzer keeps its input.
"""

import io
import json
import sys
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hovle_data", "tarfile"]):
    from hovle_core.images import ImageError, decode_image
    from hovle_data.index import scan_tar
    from hovle_data.records import from_fields
    from hovle_data.schema import BadSample
    from hovle_data.sources.rows import parse_row
    from hovle_data.sources.spans import scan_json_list
    from hovle_data.storage import LocalFile


def tar(data: bytes) -> None:
    records, problem = scan_tar(io.BytesIO(data), len(data))
    again, _ = scan_tar(io.BytesIO(data), len(data))
    assert records == again
    for record in records:
        assert record.members
        assert all(member.offset > 0 and member.size >= 0 for member in record.members)
        assert record.problem is not None or record.end() <= len(data)
    assert problem is not None or not any(record.problem for record in records[:-1])


def record(data: bytes) -> None:
    text, _, rest = data.partition(b"\0")
    with suppress(BadSample):
        from_fields("k", "s", {"json": text, "txt": rest, "0.png": rest}).validate("s")


def row(data: bytes) -> None:
    with suppress(ValueError, RecursionError):  # BadSample is one, and so is what is no JSON
        content = json.loads(data)
        with suppress(BadSample):
            parse_row(content, "k", "s")


def json_list(data: bytes) -> None:
    FILE.write_bytes(data)
    with suppress(ValueError):
        spans = scan_json_list(LocalFile(FILE))
        for i in range(len(spans)):
            with suppress(BadSample):
                json.loads(spans.text(i, "k"))


def picture(data: bytes) -> None:
    with suppress(ImageError):
        assert decode_image(data, max_pixels=1_000_000).mode == "RGB"


READERS = (tar, record, row, json_list, picture)


def one_input(data: bytes) -> None:
    if data:
        READERS[data[0] % len(READERS)](data[1:])


def seeds(folder: Path) -> None:
    """A sound input for every reader to start from."""
    from PIL import Image

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, content in (("a.json", b'{"text": "t"}'), ("a.0.png", b"x"), ("b.txt", b"u")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    rows = (
        b'[{"id": 1, "image": "a", "conversations": [{"from": "human", "value": "<image>"}]}, {"text": "t"}]'
    )
    pictures = [io.BytesIO() for _ in range(4)]
    for file, format in zip(pictures, ("PNG", "JPEG", "GIF", "TIFF"), strict=True):
        Image.new("P" if format == "GIF" else "RGB", (5, 3)).save(file, format)
    given = [
        out.getvalue(),
        b'{"messages": []}\0t',
        rows[1:-1],
        rows,
        *(file.getvalue() for file in pictures),
    ]
    for number, content in enumerate(given):
        (folder / str(number)).write_bytes(bytes([min(number, 4)]) + content)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        FILE = Path(name) / "list.json"
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        seeds(corpus)
        atheris.Setup([*sys.argv, str(corpus)], one_input)
        atheris.Fuzz()

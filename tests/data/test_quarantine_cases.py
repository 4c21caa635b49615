"""Real files that break data pipelines, from a tar to the batch: handled as a person expects, or named, every time."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from hovle_data.mixture import Mixture
from hovle_data.quarantine import Ledger, TooManyBadSamples
from hovle_data.shards import ShardSource, write_shards
from hovle_data.streams import PairStream

RED, BLUE, WHITE = (220, 10, 10), (10, 10, 220), (255, 255, 255)


def halves(left=RED, right=BLUE, mode="RGB", size=(48, 48)):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def file_of(image, format="PNG", **kwargs):
    out = io.BytesIO()
    image.save(out, format, **kwargs)
    return out.getvalue()


def rotated_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn right to see it as it was
    return file_of(halves().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif.tobytes())


def palette_with_transparency():
    image = Image.new("P", (48, 48), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (24, 0, 48, 48))
    return file_of(image, transparency=0)  # its left half cannot be seen


def sixteen_bit():
    pixels = np.full((48, 48), 60_000, np.uint16)
    pixels[:, 24:] = 3_000
    return file_of(Image.fromarray(pixels))


def animated():
    return file_of(halves(), "GIF", save_all=True, append_images=[Image.new("RGB", (48, 48), "green")] * 2)


HANDLED = {  # name -> file, its suffix, what a person sees on the left and on the right
    "cmyk": (lambda: file_of(halves().convert("CMYK"), "JPEG", quality=95), "jpg", RED, BLUE),
    "palette with transparency": (palette_with_transparency, "png", WHITE, BLUE),
    "exif rotation": (rotated_by_exif, "jpg", RED, BLUE),
    "16 bit": (sixteen_bit, "png", (233,) * 3, (12,) * 3),
    "animated": (animated, "gif", RED, BLUE),
    "wrong suffix": (lambda: file_of(halves(), "WEBP", quality=95), "JPG", RED, BLUE),
    "grey with alpha": (lambda: file_of(halves((0, 0), (0, 255), "LA")), "png", WHITE, (0, 0, 0)),
}


def bomb():
    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def record(text="a caption", **more):
    return json.dumps({"text": text, "images": 1, **more}).encode()


def conversation(tags, images):
    content = [{"type": "image"}] * tags + [{"type": "text", "text": "1"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "2"}]
    return [("json", json.dumps({"messages": messages}).encode())] + [
        (f"{n}.png", file_of(halves())) for n in range(images)
    ]


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


NAMED = {  # name -> members of its sample, the reason in the ledger
    "truncated jpeg": (
        lambda: [("json", record()), ("0.jpg", file_of(noise(), "JPEG")[:1500])],
        "image does not decode: OSError: ",
    ),
    "zero bytes": (lambda: [("json", record()), ("0.png", b"")], "empty image file"),
    "decompression bomb": (lambda: [("json", record()), ("0.png", bomb())], "image too large: "),
    "no picture": (
        lambda: [("json", record()), ("0.png", b"<html>404</html>")],
        "not a known image format: ",
    ),
    "broken utf-8 in json": (
        lambda: [("json", record().replace(b"caption", b"\xff\xfe")), ("0.png", file_of(halves()))],
        "json is not UTF-8: ",
    ),
    "broken utf-8 in txt": (lambda: [("txt", b"caf\xe9"), ("png", file_of(halves()))], "txt is not UTF-8: "),
    "half a surrogate pair": (
        lambda: [("json", record("\ud83d")), ("0.png", file_of(halves()))],
        "text is not Unicode: ",
    ),
    "missing image": (lambda: [("json", record())], "missing image: 0 of 1 are in the shard"),
    "more tags than images": (lambda: conversation(2, 1), "image tags and images differ: 2 tags, 1 images"),
    "fewer tags than images": (lambda: conversation(0, 1), "image tags and images differ: 0 tags, 1 images"),
    "file twice": (lambda: [("txt", b"one"), ("txt", b"two")], "file given twice: case.txt"),
}


def write_tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for name, content in members:
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def train_on(folder, processor, run, max_share=1.0):
    """Every sample of a folder once, as a run draws them: {key: encoded or None}, and what the ledger says."""
    ledger = Ledger(run / "quarantine-rank0.jsonl", max_share=max_share)
    source = ShardSource(folder)
    stream = PairStream(Mixture([(source, 1)], 0), processor, 0, 64, ledger)
    found = {source.key(stream.mixture.draw(k)[1]): stream.get(k) for k in range(len(source))}
    Ledger.merge(run)
    path = run / "quarantine.jsonl"
    return found, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


AROUND = ("before", [("txt", b"1 2")]), ("zafter", [("txt", b"3 4")])


@pytest.mark.parametrize("case", HANDLED)
def test_handled_as_a_person_expects(case, processor, tmp_path):
    make, suffix, left, right = HANDLED[case]
    write_tar(tmp_path / "d" / "s.tar", [AROUND[0], ("case", [("txt", b"5"), (suffix, make())]), AROUND[1]])
    for run in ("one", "two"):
        found, named = train_on(tmp_path / "d", processor, tmp_path / run)
        assert named == []
        (tile,) = found["case"].tiles  # 8 by 8
        assert np.abs(tile[:, 1].astype(int) - left).max() <= 16
        assert np.abs(tile[:, 6].astype(int) - right).max() <= 16


@pytest.mark.parametrize("case", NAMED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_skipped_the_same_way_every_time_and_named(case, processor, tmp_path):
    make, reason = NAMED[case]
    write_tar(tmp_path / "d" / "s.tar", [AROUND[0], ("case", make()), AROUND[1]])
    said = []
    for run in ("one", "two"):
        found, named = train_on(tmp_path / "d", processor, tmp_path / run)
        assert found["case"] is None
        assert found["before"] is not None
        assert found["zafter"] is not None
        assert [(line["shard"], line["key"]) for line in named] == [("d/s.tar", "case")]
        assert named[0].keys() == {"shard", "key", "reason"}
        assert named[0]["reason"].startswith(reason)
        said.append(named)
    assert said[0] == said[1]


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_tars_are_named_and_counted(damage, processor, pairs, tmp_path):
    write_shards(pairs(30), tmp_path / "d", samples_per_shard=10)
    tar = tmp_path / "d" / "shard-000001.tar"
    if damage == "truncated":
        with tar.open("r+b") as file:
            file.truncate(tar.stat().st_size // 2)
    else:
        tar.unlink()
    found, named = train_on(tmp_path / "d", processor, tmp_path / "run")
    lost = sorted(key for key, encoded in found.items() if encoded is None)
    assert len(found) == 30
    assert lost == [line["key"] for line in named]
    assert 0 < len(lost) < 10 if damage == "truncated" else len(lost) == 10
    assert lost == [f"s{i:04d}" for i in range(20 - len(lost), 20)]  # all that lay behind the cut
    assert {(line["shard"], line["reason"]) for line in named} == {("d/shard-000001.tar", f"{damage} shard")}


def test_above_one_percent_the_run_fails_with_the_three_commonest_reasons(processor, pairs, tmp_path):
    cases = ["zero bytes"] * 3 + ["missing image"] * 2 + ["broken utf-8 in txt", "no picture"]
    bad = [(f"bad{i}", NAMED[case][0]()) for i, case in enumerate(cases)]
    good = [(s.key, [("txt", s.text.encode()), ("png", s.images[0])]) for s in pairs(93)]
    write_tar(tmp_path / "d" / "s.tar", good + bad)
    found, named = train_on(tmp_path / "d", processor, tmp_path / "all", max_share=0.07)
    assert len(named) == sum(encoded is None for encoded in found.values()) == 7
    mixture = Mixture([(ShardSource(tmp_path / "d"), 1)], 0)
    default = PairStream(mixture, processor, 0, 64, Ledger())
    with pytest.raises(TooManyBadSamples, match="3 of .* samples are bad, more than max_share=0.01"):
        list(map(default.get, range(100)))
    ledger = Ledger(None, max_share=0.069, min_seen=100)
    with pytest.raises(TooManyBadSamples, match="7 of .*: 3x empty image file .*; 2x missing image .*; 1x "):
        list(map(PairStream(mixture, processor, 0, 64, ledger).get, range(100)))

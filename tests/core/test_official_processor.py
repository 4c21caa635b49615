"""The processor of a released folder: its tokenizer without remote code, its template, its tiling."""

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer

from hovle_core import HovleForConditionalGeneration, HovleProcessor
from hovle_core.cli import main
from hovle_core.official_processor import load_tokenizer
from hovle_core.testing import tiny_tokenizer
from hovle_core.testing.conformance import TokenizerTests

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = [
    "The quick brown fox jumps over the lazy dog.", "什么颜色的方块? 红色", "  two  spaces and\ttabs\n\nlines ",
    "emoji 🦊 and accents: naïve café", "<0x0A> and <s> spelt out", "1234567890 + 3.14 = ?", "", " ",
    "[UNUSED_TOKEN_1] stays one token",
]  # fmt: skip
UNUSED = 4


def train(corpus: Path, folder: Path, **options) -> None:
    """`tokenizer.model` in `folder`: a BPE that leaves text as it is."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        character_coverage=1.0, minloglevel=2, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory) -> Path:
    """A released folder as an InternLM2's is: pieces without a use at the end of `tokenizer.model`, which later tokens
    rename, and the picture tokens behind them; 320 in all, as the golden model has."""
    folder = tmp_path_factory.mktemp("internlm2")
    corpus = folder / "corpus.txt"
    corpus.write_text("the red square is here\nthe blue ring is there\n" * 20)
    unused = [f"[UNUSED_TOKEN_{i}]" for i in range(UNUSED)]
    train(corpus, folder, vocab_size=309, user_defined_symbols=unused)
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    renamed = [pieces.piece_to_id(f"[UNUSED_TOKEN_{i}]") for i in (2, 3)]
    added = {0: "<unk>", 1: "<s>", 2: "</s>", renamed[0]: "<|im_end|>", renamed[1]: "<|im_start|>"}
    later = [
        "<a>",
        "<b>",
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
        "<quad>",
        "</quad>",
        "<ref>",
        "</ref>",
        "<box>",
        "</box>",
    ]
    added |= dict(enumerate(later, start=309))
    config = {
        "added_tokens_decoder": {str(i): {"content": token, "special": True} for i, token in added.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "</s>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_internlm2.py").write_text("raise SystemExit('remote code ran')")
    (folder / "config.json").write_text((GOLDEN / "hovle-tiny" / "config.json").read_text())
    (folder / "model.safetensors").symlink_to(GOLDEN / "hovle-tiny" / "model.safetensors")
    return folder


class TestSentencePieceOfAnInternLM2(TokenizerTests):
    """`model.tokenizer` of a bare LLM's folder that holds `tokenizer.model` and no other vocabulary."""

    name = "transformers"
    model_type = "internlm2"

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls, internlm2, tmp_path_factory):
        folder = tmp_path_factory.mktemp("sentencepiece")
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(internlm2 / name, folder)
        (folder / "config.json").write_text(json.dumps({"model_type": cls.model_type}))
        return {"path": str(folder)}


class TestSentencePieceOfALlama(TestSentencePieceOfAnInternLM2):
    """A file as transformers' own class reads it, for any other LLM."""

    model_type = "llama"

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls, internlm2, tmp_path_factory):
        folder = tmp_path_factory.mktemp("llama")
        train(internlm2 / "corpus.txt", folder, vocab_size=305)
        config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "legacy": False}
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | special))
        (folder / "config.json").write_text(json.dumps({"model_type": cls.model_type}))
        return {"path": str(folder)}


def test_internlm2_tokenizes_as_sentencepiece_does(internlm2):
    tokenizer = load_tokenizer(internlm2, "internlm2")
    oracle = sentencepiece.SentencePieceProcessor(str(internlm2 / "tokenizer.model"))
    alphabet = "ab ▁é中\n<>s0xA|🦊"
    rng = random.Random(0)
    texts = [*TEXTS, *("".join(rng.choices(alphabet, k=30)) for _ in range(200))]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == oracle.encode(text), text
        assert tokenizer.decode(ids) == oracle.decode(ids), text


def test_added_tokens_keep_their_ids(internlm2):
    tokenizer = load_tokenizer(internlm2, "internlm2")
    config = json.loads((internlm2 / "tokenizer_config.json").read_text())
    assert len(tokenizer) == 320
    for i, token in config["added_tokens_decoder"].items():
        assert tokenizer(token["content"], add_special_tokens=False)["input_ids"] == [int(i)]
    assert "[UNUSED_TOKEN_2]" not in tokenizer.get_vocab()


def test_processor_writes_the_released_prompt(internlm2):
    processor = HovleProcessor.from_pretrained(internlm2)
    oracle = sentencepiece.SentencePieceProcessor(str(internlm2 / "tokenizer.model"))
    start, end = processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    system = (
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
        "英文名叫InternVL, 是一个有用无害的人工智能助手。"
    )
    messages = [{"role": "user", "content": "what colour?"}]
    ids = processor.encode(messages, add_generation_prompt=True).input_ids.tolist()
    assert ids == [
        1, start, *oracle.encode(f"system\n{system}"), end, start, *oracle.encode("user\nwhat colour?"), end,
        start, *oracle.encode("assistant\n"),
    ]  # fmt: skip
    assert processor.tokenizer.eos_token_id == end
    assert processor.tokens_per_tile == 4
    assert processor.image_processor.tile_size == 56


@torch.no_grad()
def test_a_released_folder_becomes_ours_with_its_tokenizer(internlm2, tmp_path):
    assert main(["convert", str(internlm2), str(tmp_path / "ours"), "--to", "hovle"]) == 0
    assert not list(tmp_path.rglob("*.py"))
    a, b = HovleProcessor.from_pretrained(internlm2), HovleProcessor.from_pretrained(tmp_path / "ours")
    messages = [{"role": "user", "content": "café 🦊 <|im_end|> [UNUSED_TOKEN_1]"}]
    assert a.encode(messages).input_ids.tolist() == b.encode(messages).input_ids.tolist()
    model = HovleForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert sorted(model.generation_config.eos_token_id) == sorted({2, b.tokenizer.eos_token_id})
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "released"]) == 0
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (internlm2 / name).read_bytes()
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[n], x) for n, x in load_file(internlm2 / "model.safetensors").items())


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        if path.suffix in (".json", ".model"):
            (to / path.name).write_bytes(path.read_bytes())
    return to


def test_settings_of_the_folder_are_followed(internlm2, tmp_path):
    folder = copied(internlm2, tmp_path / "released")
    config = json.loads((folder / "config.json").read_text())
    config |= {"dynamic_image_size": False, "use_thumbnail": False}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}'
    )
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    processor = HovleProcessor.from_pretrained(folder).image_processor
    assert (processor.min_tiles, processor.max_tiles, processor.use_thumbnail) == (1, 1, False)
    assert processor.image_mean == [0.5] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "tokenizer.model").unlink(), "holds no tokenizer .*vocab.json.: copy"),
        (lambda f: edit(f / "config.json", template="vicuna"), "template 'vicuna' is not known .*internlm2-chat"),
        (lambda f: edit(f / "tokenizer_config.json", added_tokens_decoder={"400": {"content": "<x>"}}),
         "token '<x>' must be 400 and would be"),
        (lambda f: edit(f / "tokenizer_config.json", added_tokens_decoder={}), "has <IMG_CONTEXT> at None, .* 313"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, message, internlm2, tmp_path):
    folder = copied(internlm2, tmp_path / "released")
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        HovleProcessor.from_pretrained(folder)


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_without_sentencepiece_the_extra_is_named(internlm2, monkeypatch):
    monkeypatch.setattr("hovle_core.sentencepiece_tokenizer.is_sentencepiece_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'hovle-core\[sentencepiece\]'"):
        HovleProcessor.from_pretrained(internlm2)


def test_other_tokenizers_are_read_by_transformers_own_classes(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "fast")
    config = tmp_path / "fast" / "tokenizer_config.json"
    edit(config, auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}, tokenizer_class="EvilTokenizer")
    text = "a red square 🦊"
    assert (
        load_tokenizer(tmp_path / "fast", "llama")(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    )
    vocab = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "vocab.json").write_text(json.dumps(vocab["vocab"]))
    (tmp_path / "qwen" / "merges.txt").write_text("\n".join(" ".join(merge) for merge in vocab["merges"]))
    qwen = load_tokenizer(tmp_path / "qwen", "qwen2")
    assert isinstance(qwen, Qwen2Tokenizer)
    assert qwen.decode(qwen(text)["input_ids"]) == text

"""`hovle convert`: both ways, tensor for tensor, whole or not at all, and what does not fit is named."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hovle_core import HovleConfig, HovleForConditionalGeneration, HovleProcessor, convert
from hovle_core.cli import main
from hovle_core.official import config_from_released, config_to_released
from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
LLMS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def run(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


def write(folder: Path, config: dict, tensors: dict, shards: int = 1) -> Path:
    """A released folder; tensors are dealt out to the shards in turn."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    dealt = {
        f"model-{i + 1:05d}-of-{shards:05d}.safetensors": list(tensors)[i::shards] for i in range(shards)
    }
    for file, names in dealt.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in dealt.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def released(folder: Path, golden: str, llm: str, shards: int = 1, dtype=torch.float32, tied: bool = False):
    """A released checkpoint with the golden embedding and an LLM of any kind, named by transformers itself."""
    config = json.loads((GOLDEN / golden / "config.json").read_text())
    tensors = load_file(GOLDEN / golden / "model.safetensors")
    if llm != "internlm2":
        sizes = {k: config["llm_config"][k] for k in ("vocab_size", "hidden_size", "intermediate_size")}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        kind, model = LLMS[llm]
        model = model(kind(**sizes, **heads, tie_word_embeddings=tied))
        for parameter in model.parameters():  # biases too, which start at zero
            torch.nn.init.normal_(parameter, std=0.1)
        tensors = {name: x for name, x in tensors.items() if name.startswith("embedding_model.")}
        tensors |= {f"language_model.{name}": x.clone() for name, x in model.state_dict().items()}
        config["llm_config"] = {
            **sizes, **heads, "model_type": llm, "architectures": [kind.__name__], "rope_theta": 10000.0,
            "tie_word_embeddings": tied, "temperature": 1.0, "bad_words_ids": None, "max_length": 20,
        }  # fmt: skip
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    return write(folder, config, {name: x.to(dtype) for name, x in tensors.items()}, shards)


@pytest.mark.parametrize("golden", ["hovle-tiny", "hovle-hd-tiny"])
@pytest.mark.parametrize(
    ("llm", "shards", "dtype"),
    [
        ("internlm2", 1, torch.float32),
        ("internlm2", 3, torch.bfloat16),
        ("llama", 1, torch.bfloat16),
        ("qwen2", 2, torch.float16),
    ],
)
def test_round_trip_is_byte_identical(golden, llm, shards, dtype, tmp_path):
    source = released(tmp_path / "released", golden, llm, shards, dtype)
    assert run(source, tmp_path / "ours", "--to", "hovle") == 0
    assert run(tmp_path / "ours", tmp_path / "back", "--to", "released") == 0
    assert hashes(tmp_path / "back") == hashes(source)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert len(hashes(tmp_path / "ours")) == shards
    if shards > 1:
        maps = [
            json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
            for folder in (source, tmp_path / "back")
        ]
        assert maps[0] == maps[1]
    ours = HovleForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert {p.dtype for p in ours.parameters()} == {dtype}
    direct = HovleForConditionalGeneration.from_pretrained(source)
    assert {p.dtype for p in direct.parameters()} == {dtype}
    a, b = ours.state_dict(), direct.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("tied", [False, True])
def test_llm_computes_what_transformers_does(llm, tied, tmp_path):
    source = released(tmp_path / "released", "hovle-tiny", llm, tied=tied)
    assert run(source, tmp_path / "ours", "--to", "hovle") == 0
    model = HovleForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    tensors = load_file(source / "model.safetensors")
    own = {
        name.removeprefix("language_model."): x
        for name, x in tensors.items()
        if name.startswith("language_model.")
    }
    peer = LLMS[llm][1](model.config.text_config).eval()
    peer.load_state_dict(own)
    ids = torch.randint(0, 300, (2, 9))
    torch.testing.assert_close(model.language_model(ids).logits, peer(ids).logits)
    head, table = model.get_output_embeddings().weight, model.language_model.get_input_embeddings().weight
    assert (head is table) == tied
    assert run(tmp_path / "ours", tmp_path / "back", "--to", "released") == 0
    assert hashes(tmp_path / "back") == hashes(source)  # a tied head that was there twice too


def test_wqkv_is_interleaved_by_groups(tmp_path):
    """Ours -> released, spelled out head by head, with q, k and v in different shards."""
    source = released(tmp_path / "released", "hovle-tiny", "internlm2")
    assert run(source, tmp_path / "one", "--to", "hovle") == 0
    ours = load_file(tmp_path / "one" / "model.safetensors")
    sharded = write(
        tmp_path / "ours", json.loads((tmp_path / "one" / "config.json").read_text()), ours, shards=4
    )
    assert run(sharded, tmp_path / "back", "--to", "released") == 0
    back = {}
    for path in (tmp_path / "back").glob("*.safetensors"):
        back |= load_file(path)
    heads, kv_heads, d = 4, 2, 16
    for theirs, mine in (("language_model.model.layers.1.attention", "language_model.model.layers.1.self_attn"),
                         ("embedding_model.encoder.0.attention", "embedding.layers.0.self_attn")):  # fmt: skip
        q, k, v = (ours[f"{mine}.{letter}_proj.weight"].split(d) for letter in "qkv")
        rows = []
        for group in range(kv_heads):
            rows += [*q[group * heads // kv_heads : (group + 1) * heads // kv_heads], k[group], v[group]]
        assert torch.equal(back[f"{theirs}.wqkv.weight"], torch.cat(rows))
    want = load_file(source / "model.safetensors")
    assert back.keys() == want.keys()
    assert all(torch.equal(back[name], want[name]) for name in want)


@pytest.fixture
def own(tmp_path):
    """A HoVLE that was made here, with its processor, in our format."""
    tokenizer = tiny_tokenizer()
    tiny_hovle(tokenizer).save_pretrained(tmp_path / "own")
    tiny_processor(tokenizer, max_tiles=3).save_pretrained(tmp_path / "own")
    return tmp_path / "own"


@torch.no_grad()
def test_a_model_made_here_goes_out_and_comes_back(own, tmp_path):
    assert run(own, tmp_path / "out", "--to", "released") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["llm_config"]["architectures"] == ["LlamaForCausalLM"]
    assert config["max_dynamic_patch"] == 3
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["size"] == 56
    assert "embedding_model.encoder.0.attention.wqkv.weight" in load_file(
        tmp_path / "out" / "model.safetensors"
    )
    assert run(tmp_path / "out", tmp_path / "again", "--to", "hovle") == 0
    assert hashes(tmp_path / "again") == hashes(own)
    messages = [{"role": "user", "content": "a red square"}]
    before = HovleProcessor.from_pretrained(own)
    ids = before.encode(messages).input_ids
    logits = HovleForConditionalGeneration.from_pretrained(own)(torch.from_numpy(ids)[None]).logits
    for folder in ("out", "again"):
        processor = HovleProcessor.from_pretrained(tmp_path / folder)
        assert processor.encode(messages).input_ids.tolist() == ids.tolist()
        assert processor.image_processor.to_dict() == before.image_processor.to_dict()
        assert processor.tokens_per_tile == before.tokens_per_tile
        model = HovleForConditionalGeneration.from_pretrained(tmp_path / folder)
        assert torch.equal(model(torch.from_numpy(ids)[None]).logits, logits)
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert before.tokenizer.eos_token_id in generation["eos_token_id"]
    assert generation["suppress_tokens"] == [before.image_token_id]


def test_small_files_come_back_as_they_were(own, tmp_path):
    source = tmp_path / "released"
    assert run(own, source, "--to", "released") == 0
    (source / "special_tokens_map.json").write_text('{"bos_token":   "<|im_start|>"}')
    assert run(source, tmp_path / "ours", "--to", "hovle") == 0
    assert run(tmp_path / "ours", tmp_path / "back", "--to", "released") == 0
    files = {path.name for path in source.iterdir()}
    assert files == {path.name for path in (tmp_path / "back").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= files
    for name in files - {"config.json"}:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name


def test_null_is_not_our_default():
    released = json.loads((GOLDEN / "hovle-tiny" / "config.json").read_text())
    released["embedding_config"]["num_key_value_heads"] = (
        None  # as many as heads; our default is the released model's 8
    )
    assert config_from_released(released).embedding_config.num_key_value_heads == 4


def test_config_goes_back_with_what_has_changed_since(tmp_path):
    original = json.loads((GOLDEN / "hovle-tiny" / "config.json").read_text())
    original["llm_config"]["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    config_from_released(original).save_pretrained(tmp_path)
    config = HovleConfig.from_pretrained(tmp_path)  # `released` outlives saving and loading
    assert config_to_released(config) == original
    config.embedding_config.rms_norm_eps = 3e-5
    changed = config_to_released(config)
    assert changed["embedding_config"].pop("rms_norm_eps") == 3e-5
    original["embedding_config"].pop("rms_norm_eps")
    assert changed == original


@pytest.mark.parametrize("to", ["hovle", "released"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.pop(name), "missing {name}, expected [320, 64]"),
        (lambda t, name: t.update(extra=torch.zeros(2, 3)), "unknown extra [2, 3]"),
        (lambda t, name: t.update({name: torch.zeros(3, 64)}), "{name} is [3, 64], expected [320, 64]"),
    ],
)
def test_misfit_tensors_are_named(to, change, message, tmp_path, capsys):
    source = released(tmp_path / "released", "hovle-tiny", "internlm2")
    name = "language_model.output.weight"
    if to == "released":
        assert run(source, tmp_path / "ours", "--to", "hovle") == 0
        source, name = tmp_path / "ours", "language_model.lm_head.weight"
    tensors = load_file(source / "model.safetensors")
    change(tensors, name)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for flags in ([], ["--dry-run"]):
        assert run(source, tmp_path / "out", "--to", to, *flags) == 2
        assert message.format(name=name) in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_parts_of_unlike_dtypes_are_not_joined(own, tmp_path, capsys):
    tensors = load_file(own / "model.safetensors")
    name = "embedding.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].half()
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    assert run(own, tmp_path / "out", "--to", "released") == 2
    error = capsys.readouterr().err
    assert name in error
    assert "torch.float16" in error
    assert not (tmp_path / "out").exists()


def unreadable(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    raw = json.loads(config.read_text())
    if what == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "damaged":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "shard":
        (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
        )
    elif what == "model":
        raw["model_type"] = "llava"
    elif what == "llm":
        raw["llm_config"]["model_type"] = "mamba"
    elif what == "switch":
        raw["embedding_config"]["use_2d_sincos_pos_embed"] = True
    elif what == "size":
        raw["force_image_size"] = 28
    config.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pickle", "(there is pytorch_model.bin); pickled weights are refused"),
        ("damaged", "is damaged or no safetensors file"),
        ("shard", "lacks ['model-00001-of-00002.safetensors']"),
        ("model", "model_type 'llava'"),
        ("llm", "llm_config.model_type 'mamba' is not known; known are ['internlm2', 'llama', 'qwen2']"),
        ("switch", "embedding_config.use_2d_sincos_pos_embed is True; only False is known"),
        ("size", "force_image_size 28 must equal embedding_config.image_size 56"),
    ],
)
def test_what_cannot_be_read_is_one_line(what, message, tmp_path, capsys):
    source = released(tmp_path / "released", "hovle-tiny", "internlm2")
    unreadable(source, what)
    assert run(source, tmp_path / "out", "--to", "hovle") == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["released"]


def test_an_llm_that_the_released_format_has_not(tmp_path, capsys):
    from transformers import MistralConfig

    tokenizer = tiny_tokenizer()
    config = tiny_hovle(tokenizer).config
    config.text_config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=config.embedding_config.hidden_size, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    HovleForConditionalGeneration(config).save_pretrained(tmp_path / "own")
    assert run(tmp_path / "own", tmp_path / "out", "--to", "released") == 2
    assert "no LLM of type 'mistral'; it has ['internlm2', 'llama', 'qwen2']" in capsys.readouterr().err


def test_dry_run_says_what_would_be_written(tmp_path, capsys):
    source = released(tmp_path / "released", "hovle-tiny", "internlm2", shards=2)
    assert run(source, tmp_path / "out", "--to", "hovle", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "model-00001-of-00002.safetensors: " in out
    assert "LLM internlm2 -> llama" in out
    assert "nothing was written" in out
    assert not (tmp_path / "out").exists()


def test_destination_is_replaced_whole_and_only_when_told(tmp_path, capsys, monkeypatch):
    source = released(tmp_path / "released", "hovle-tiny", "internlm2", shards=2)
    out = tmp_path / "out"
    assert run(source, out, "--to", "hovle") == 0
    before = hashes(out)
    assert run(source, out, "--to", "hovle") == 2
    assert "is not empty: choose another folder, or pass --force" in capsys.readouterr().err

    (out / "stale.txt").write_text("of before")
    written = []

    def full(tensors, path, metadata):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            run(source, out, "--to", "hovle", "--force")
    assert hashes(out) == before
    assert (out / "stale.txt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "released"]

    assert run(source, out, "--to", "hovle", "--force") == 0
    assert hashes(out) == before
    assert not (out / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "released"]


def test_destinations_that_are_refused(tmp_path, capsys):
    (tmp_path / "home").mkdir()
    source = released(tmp_path / "home" / "released", "hovle-tiny", "internlm2")
    for destination, message in (
        (source, "holds the source"),
        (tmp_path / "home", "holds the source"),
        (source / "config.json", "is a file"),
    ):
        assert run(source, destination, "--to", "hovle", "--force") == 2
        assert message in capsys.readouterr().err
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    assert run(source, tmp_path / "photos", "--to", "hovle", "--force") == 2
    assert "is no checkpoint (no config.json): --force does not replace it" in capsys.readouterr().err
    assert run(source, tmp_path / "out", "--to", "released") == 2
    assert "is in the released format already" in capsys.readouterr().err
    assert (tmp_path / "photos" / "cat.png").is_file()


def test_a_finished_run_is_a_source(own, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.move(own, tmp_path / "run" / "final")
    assert run(tmp_path / "run", tmp_path / "out", "--to", "released") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "value"),
    [("mask_type", "image_bidirectional"), ("image_mean", [0.5] * 3), ("token_mixer", "fading")],
)
def test_what_the_released_code_cannot_do_is_refused(name, value):
    config = tiny_hovle(tiny_tokenizer()).config
    setattr(config.embedding_config, name, value)
    with pytest.raises(
        ValueError, match=f"embedding_config.{name} is .*keep this checkpoint in hovle's own format"
    ):
        config_to_released(config)

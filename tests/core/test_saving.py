"""What is saved is what is loaded, bit for bit: whole, in shards, on several devices, in other dtypes, over HTTP."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForImageTextToText

from hovle_core import HovleForConditionalGeneration, HovleProcessor
from hovle_core.cli import main
from hovle_core.fusion import place_image_tokens
from hovle_core.testing import tiny_hovle, tiny_llm, tiny_processor, tiny_tokenizer


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_tokenizer())


@pytest.fixture(scope="module", params=["pre", "post"])
def model(request, processor):
    return tiny_hovle(processor.tokenizer, pixel_shuffle_loc=request.param)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def inputs(processor):
    return processor(images=Image.radial_gradient("L").convert("RGB"), text="<IMG_CONTEXT>what is this")


def assert_same(first, second):
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


def test_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    again, info = HovleForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(again, model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_stored_once_and_tied_again(processor, tied, tmp_path):
    """The LLM's head is tied to the LLM's own table, never to the embedding's."""
    V = len(processor.tokenizer)
    model = HovleForConditionalGeneration.from_language_model(
        tiny_llm(V, tie_word_embeddings=tied), tiny_hovle(processor.tokenizer).config.embedding_config, 5
    )
    model.save_pretrained(tmp_path)
    again = HovleForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(again, model)
    llm = again.language_model
    assert (llm.lm_head.weight is llm.model.embed_tokens.weight) == tied
    assert again.embedding.embed_tokens.weight is not llm.model.embed_tokens.weight
    assert again.get_output_embeddings() is llm.lm_head


def test_resized_embeddings_are_saved_and_loaded(processor, tmp_path):
    model = tiny_hovle(processor.tokenizer)
    before, size = model.get_input_embeddings().weight.clone(), len(processor.tokenizer) + 3
    model.resize_token_embeddings(size, mean_resizing=False)
    model.save_pretrained(tmp_path)
    again = HovleForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(again, model)
    assert again.get_input_embeddings().weight.shape[0] == again.get_output_embeddings().out_features == size
    assert torch.equal(again.get_input_embeddings().weight[:-3], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(folder, inputs, dtype, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(**inputs).logits.dtype == dtype
    model.save_pretrained(tmp_path)
    assert_same(AutoModelForImageTextToText.from_pretrained(tmp_path), model)  # "auto": as saved


def test_device_map_splits_both_stacks_and_no_block(model, folder, inputs, tmp_path):
    """The disk stands for a second device: what lies there is brought in block by block, as accelerate does."""
    assert model._no_split_modules >= {"TransformerBlock", "LlamaDecoderLayer"}
    devices = {
        "embedding.embed_tokens": "cpu", "embedding.patch_embed": "disk", "embedding.pixel_shuffle_proj": "cpu",
        "embedding.rotary_emb": "cpu", "embedding.layers.0": "cpu", "embedding.layers.1": "disk",
        "language_model.model.layers.0": "disk", "language_model.model.layers.1": "cpu",
        "language_model.model.embed_tokens": "cpu", "language_model.model.norm": "cpu",
        "language_model.model.rotary_emb": "cpu", "language_model.lm_head": "cpu",
    }  # fmt: skip
    split = AutoModelForImageTextToText.from_pretrained(folder, device_map=devices, offload_folder=tmp_path)
    assert split.embedding.layers[1].mlp.up_proj.weight.device.type == "meta"
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(split.generate(**inputs, **options), model.generate(**inputs, **options))
    assert_same(AutoModelForImageTextToText.from_pretrained(folder, device_map="auto"), model)


@pytest.mark.parametrize(("table", "patches"), [("cpu", "cuda:0"), ("cuda:0", "cuda:1")])
def test_image_tokens_come_from_another_device(table, patches):
    """As PyTorch's compiler sees devices that are not here."""
    with FakeTensorMode():
        embeds, tokens = torch.empty(1, 4, 8, device=table), torch.empty(2, 8, device=patches)
        is_image = torch.ones(1, 4, dtype=torch.bool, device="cpu")
        assert place_image_tokens(embeds, is_image, tokens).device == torch.device(table)


def test_device_map_auto_fits_any_budget(folder, tmp_path):
    """What is made of bare parameters is one piece; the largest pieces are the tables."""
    for size in range(60_000, 160_000, 5_000):
        budget = {"cpu": size}
        split = AutoModelForImageTextToText.from_pretrained(
            folder, device_map="auto", max_memory=budget, offload_folder=tmp_path
        )
        assert not any(name.startswith("embedding.patch_embed.") for name in split.hf_device_map), size


def adapted_bases(processor, folder):
    """(name, model, the model with a LoRA that changes it) of a base in each format, saved in `folder / name`."""
    tiny_hovle(processor.tokenizer).save_pretrained(folder / "ours")
    assert main(["convert", str(folder / "ours"), str(folder / "released"), "--to", "released"]) == 0
    for base in ("ours", "released"):
        model = HovleForConditionalGeneration.from_pretrained(folder / base)
        lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        yield base, model, get_peft_model(model, lora).eval()


def test_an_adapters_folder_is_its_base_and_the_adapter(processor, inputs, tmp_path):
    for base, _, adapted in adapted_bases(processor, tmp_path):
        adapted.save_pretrained(tmp_path / f"adapter-{base}")
        again, info = HovleForConditionalGeneration.from_pretrained(
            tmp_path / f"adapter-{base}", output_loading_info=True
        )
        assert not any(info.values())
        assert not again.training
        assert torch.equal(again(**inputs).logits, adapted(**inputs).logits)
        logits = again(**inputs).logits
        again.disable_adapters()
        assert not torch.equal(again(**inputs).logits, logits)
    from_auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter-ours")
    ours = HovleForConditionalGeneration.from_pretrained(str(tmp_path), subfolder="adapter-ours")
    assert_same(ours, from_auto)
    assert ours.name_or_path == from_auto.name_or_path


def test_an_adapter_beside_its_model_is_on_it(processor, inputs, tmp_path):
    """In both formats: a folder that holds a model and an adapter is both."""
    for base, model, adapted in adapted_bases(processor, tmp_path):
        adapted.save_pretrained(tmp_path / base)
        again, info = HovleForConditionalGeneration.from_pretrained(
            tmp_path / base, adapter_name="mine", output_loading_info=True
        )
        assert again.active_adapters() == ["mine"], base
        assert not any(info.values())
        assert torch.equal(again(**inputs).logits, adapted(**inputs).logits)
        assert again.generation_config.to_dict() == model.generation_config.to_dict()
        # Another adapter of this base is on the base alone.
        second = get_peft_model(tiny_hovle(processor.tokenizer), LoraConfig(target_modules=["k_proj"]))
        second.save_pretrained(tmp_path / f"second-{base}")
        config = tmp_path / f"second-{base}" / "adapter_config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / base)})
        )
        assert HovleForConditionalGeneration.from_pretrained(config.parent).active_adapters() == ["default"]
        # And what the adapter lies beside has to be whole.
        other = copy.deepcopy(model.config)
        other.embedding_config.intermediate_size += 32
        with pytest.raises(ValueError, match="do not fit its config"):
            HovleForConditionalGeneration.from_pretrained(tmp_path / base, config=other)
        assert main(["convert", str(tmp_path / base), str(tmp_path / "converted"), "--to", "hovle"]) == 2


def test_an_adapter_on_the_hub_is_loaded_onto_its_base(processor, inputs, tmp_path, monkeypatch):
    """The hub itself is what cannot be asked here: the snapshot stands for what it would have sent."""
    tiny_hovle(processor.tokenizer).save_pretrained(tmp_path / "ours")
    model = HovleForConditionalGeneration.from_pretrained(tmp_path / "ours")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "snapshot")
    asked = []

    def snapshot(repo, **options):
        asked.append((repo, options.get("revision")))
        return str(tmp_path / {"someone/adapter": "snapshot", "someone/base": "ours"}[repo])

    monkeypatch.setattr("hovle_core.hub.snapshot_download", snapshot)
    again = HovleForConditionalGeneration.from_pretrained("someone/adapter", revision="v2")
    assert asked == [("someone/adapter", "v2")]  # of the adapter, not of its base
    assert torch.equal(again(**inputs).logits, adapted(**inputs).logits)
    config = tmp_path / "snapshot" / "adapter_config.json"
    base = {"base_model_name_or_path": "someone/base", "revision": "v7"}
    config.write_text(json.dumps(json.loads(config.read_text()) | base))
    again = HovleForConditionalGeneration.from_pretrained("someone/adapter")
    assert asked[1:] == [("someone/adapter", None), ("someone/base", "v7")]
    assert again.name_or_path == "someone/base"


@pytest.mark.parametrize("to", ["hovle", "released"])
def test_what_may_mismatch_is_drawn_anew_in_both_formats(processor, tmp_path, to):
    tiny_hovle(processor.tokenizer).save_pretrained(tmp_path / "hovle")
    if to == "released":
        assert main(["convert", str(tmp_path / "hovle"), str(tmp_path / "released"), "--to", "released"]) == 0
    model = HovleForConditionalGeneration.from_pretrained(tmp_path / to)
    config = copy.deepcopy(model.config)
    config.embedding_config.intermediate_size += 32
    with pytest.raises(ValueError, match="do not fit its config"):
        HovleForConditionalGeneration.from_pretrained(tmp_path / to, config=config)
    other, info = HovleForConditionalGeneration.from_pretrained(
        tmp_path / to, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(info["mismatched_keys"]) == 3 * len(model.embedding.layers)
    assert other.embedding.layers[0].mlp.up_proj.weight.isfinite().all()
    assert torch.equal(other.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_an_adapter_without_a_base_or_in_a_pickle_is_refused(tmp_path):
    config = tmp_path / "adapter_config.json"
    for base, error, message in (
        (None, ValueError, "names no base_model_name_or_path: load the base model, then the adapter"),
        ("x", FileNotFoundError, "no adapter_model.safetensors"),
    ):
        config.write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))
        (tmp_path / "adapter_model.bin").write_bytes(b"")
        with pytest.raises(error, match=message):
            HovleForConditionalGeneration.from_pretrained(tmp_path)


def test_gradient_checkpointing_recomputes_and_changes_nothing(processor, inputs):
    for location in ("pre", "post"):
        model = tiny_hovle(processor.tokenizer, pixel_shuffle_loc=location).train()
        layers, runs = [*model.embedding.layers, *model.language_model.model.layers], []
        for layer in layers:
            layer.self_attn.register_forward_pre_hook(lambda *args, runs=runs: runs.append(args[0]))

        def gradients(model=model, runs=runs):
            runs.clear()
            model.zero_grad()
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, len(
                runs
            )

        plain, once = gradients()
        model.gradient_checkpointing_enable()
        recomputed, twice = gradients()
        model.gradient_checkpointing_disable()
        assert (once, twice, gradients()[1]) == (len(layers), 2 * len(layers), len(layers))
        assert plain.keys() == recomputed.keys()
        assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


PUSH = """
import hovle_core
from transformers import AutoModelForImageTextToText, AutoProcessor
model, processor = AutoModelForImageTextToText.from_pretrained("made"), AutoProcessor.from_pretrained("made")
model.push_to_hub("someone/hovle-tiny", max_shard_size="40KB", token="none")
processor.push_to_hub("someone/hovle-tiny", token="none")
"""


@pytest.mark.slow
def test_push_to_hub_and_back(processor, tmp_path):
    """huggingface_hub's own client against a hub on loopback (push_hub.py); test_hub.py reads from one."""
    (tmp_path / "hub").mkdir()
    model = tiny_hovle(processor.tokenizer)
    model.save_pretrained(tmp_path / "made")
    processor.save_pretrained(tmp_path / "made")
    script = Path(__file__).with_name("push_hub.py")
    hub = subprocess.Popen([sys.executable, script, tmp_path / "hub"], stdout=subprocess.PIPE, text=True)
    try:
        environment = os.environ | {
            "HF_ENDPOINT": hub.stdout.readline().strip(), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        result = subprocess.run(
            [sys.executable, "-c", PUSH],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        hub.kill()
        hub.wait()
    assert result.returncode == 0, result.stderr
    pushed = tmp_path / "hub" / "someone" / "hovle-tiny"
    assert len(list(pushed.glob("model-*.safetensors"))) > 3
    assert json.loads((pushed / "config.json").read_text())["model_type"] == "hovle"
    assert_same(AutoModelForImageTextToText.from_pretrained(pushed), model)
    assert HovleProcessor.from_pretrained(pushed).tokens_per_tile == processor.tokens_per_tile

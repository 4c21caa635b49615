"""Token mixers in the embedding's blocks: found by name, with a state in the cache, and a mixer of our own as the kit
writes it."""

import copy
import json

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from hovle_core import HolisticEmbeddingConfig, HovleForConditionalGeneration
from hovle_core.holistic_embedding import HolisticEmbedding
from hovle_core.kit.new import fields_of, render
from hovle_core.testing import tiny_embedding_config, tiny_hovle, tiny_processor, tiny_tokenizer

PLUGIN = """
@hookimpl
def hovle_token_mixers(): return [Spec("fading", "fading_mixer:Fading"), Spec("odd", "builtins:dict")]
"""


@pytest.fixture
def fading(site_packages):
    """The plugin that `hovle plugin new fading --kind token-mixer` writes."""
    source = render("token_mixer.py", fields_of("fading", "token_mixer"))
    (site_packages.path / "fading_mixer.py").write_text(source)
    site_packages.modules.append("fading_mixer")
    site_packages.install("fading", PLUGIN)
    return site_packages


def test_a_config_without_the_field_is_the_released_models():
    raw = json.loads(tiny_embedding_config(64).to_json_string())
    del raw["token_mixer"], raw["token_mixer_options"]
    assert HolisticEmbeddingConfig(**raw).token_mixer == "attention"
    other = tiny_embedding_config(64, token_mixer="fading", token_mixer_options={"chunk_size": 2})
    raw = json.loads(other.to_json_string())
    assert (raw["token_mixer"], raw["token_mixer_options"]) == ("fading", {"chunk_size": 2})


def test_names_and_options_are_checked(fading):
    def error(**fields) -> str:
        with pytest.raises(ValueError) as raised:
            HolisticEmbedding(tiny_embedding_config(64, **fields))
        return str(raised.value)

    said = error(token_mixer="fadding")
    assert "embedding_config.token_mixer: there is no token_mixer 'fadding'; did you mean 'fading'?" in said
    assert "correct the name, or install the plugin that provides it" in said
    options = {"chunksize": 3}
    assert "did you mean 'chunk_size'?" in error(token_mixer="fading", token_mixer_options=options)
    assert "chunk_size must be at least 1" in error(
        token_mixer="fading", token_mixer_options={"chunk_size": 0}
    )
    assert "unexpected keyword argument 'chunksize'" in error(token_mixer_options=options)
    assert "'odd' is a dict, not a hovle_core.roles.TokenMixer" in error(token_mixer="odd")
    fields = {"token_mixer": "fading", "mask_type": "image_bidirectional"}
    assert "mask_type 'image_bidirectional' is for token_mixer 'attention'" in error(**fields)


def test_a_broken_plugin_is_named_where_its_token_mixer_is_wanted(site_packages):
    site_packages.install("fading", "import not_there_at_all")
    with pytest.raises(
        ValueError, match="plugin 'fading' of dist-fading 1.0: cannot import .*not_there_at_all"
    ):
        HolisticEmbedding(tiny_embedding_config(64, token_mixer="fading"))
    assert HolisticEmbedding(tiny_embedding_config(64)).layers[0].self_attn.q_proj is not None


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_chunks_are_the_recurrence_written_out(fading, chunk_size):
    """S = decay * S + k v, out = q S, token by token, and a new S for each packed sample."""
    config = tiny_embedding_config(64, token_mixer="fading", token_mixer_options={"chunk_size": chunk_size})
    torch.manual_seed(0)
    mixer = HolisticEmbedding(config).layers[0].self_attn
    torch.nn.init.normal_(mixer.o_proj.weight)
    lengths = (7, 1, 6)
    x = torch.randn(1, sum(lengths), config.hidden_size)
    heads = config.num_attention_heads
    with torch.no_grad():
        q, k, v = (p(x)[0].view(len(x[0]), heads, -1) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        decay = torch.exp(-torch.exp(mixer.log_decay))
        outs = []
        for start, length in zip((0, 7, 8), lengths, strict=True):
            state = torch.zeros(heads, config.head_dim, config.head_dim)
            for t in range(start, start + length):
                state = decay[:, None, None] * state + torch.einsum("hi,hj->hij", k[t], v[t])
                outs.append(F.rms_norm(torch.einsum("hi,hij->hj", q[t], state), (config.head_dim,)))
        expected = mixer.o_proj(torch.stack(outs).flatten(1) * F.silu(mixer.gate_proj(x[0])))
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        torch.testing.assert_close(mixer(x, positions)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("location", ["pre", "post"])
@torch.no_grad()
def test_pictures_are_answered_the_same_with_a_cache(fading, location):
    processor = tiny_processor(tiny_tokenizer(), max_tiles=1)
    model = tiny_hovle(processor.tokenizer, token_mixer="fading", pixel_shuffle_loc=location)
    picture = Image.radial_gradient("L").convert("RGB")
    inputs = processor(
        images=[picture, picture],
        text=["<IMG_CONTEXT>what is this", "a red square <IMG_CONTEXT>"],
        padding=True,
    )
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cache = DynamicCache(config=model.config)
    cached = model.generate(**inputs, **options, past_key_values=cache)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    blocks = cache.layers[model.config.text_config.num_hidden_layers :]
    sizes = {tuple(layer.state.shape) for layer in blocks}
    assert sizes == {(2, 4, 8, 8)}, "a state is as large however many tokens it has seen"
    assert blocks[0].get_seq_length() >= cached.shape[1] - 1

    cache.reset()
    again = model.generate(**inputs, **options, past_key_values=cache)
    assert torch.equal(again, cached)
    with pytest.raises(ValueError, match="state cannot forget its last tokens"):
        cache.crop(-1)


@torch.no_grad()
def test_a_checkpoint_needs_its_plugin(fading, tmp_path, monkeypatch):
    model = tiny_hovle(tiny_tokenizer(), token_mixer="fading", token_mixer_options={"chunk_size": 3})
    model.save_pretrained(tmp_path)
    again = HovleForConditionalGeneration.from_pretrained(tmp_path)
    ids = torch.arange(3, 12)[None]
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert again.embedding.layers[1].self_attn.chunk_size == 3
    monkeypatch.setenv("HOVLE_PLUGINS", "")
    with pytest.raises(
        ValueError, match=r"no token_mixer 'fading' \(known: attention\).* install the plugin"
    ):
        HovleForConditionalGeneration.from_pretrained(tmp_path)


@torch.no_grad()
def test_static_caches_are_refused(fading):
    model = tiny_hovle(tiny_tokenizer(), token_mixer="fading")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(
        ValueError, match="StaticLayer for embedding block 0, whose token mixer keeps a state"
    ):
        model(torch.arange(3, 12)[None], past_key_values=cache)
    full = DynamicCache(config=model.config)
    tiny_hovle(tiny_tokenizer())(torch.arange(3, 12)[None], past_key_values=full)
    with pytest.raises(ValueError, match="use an empty DynamicCache"):
        model(torch.arange(3, 12)[None], past_key_values=full)


def test_recomputed_activations_are_the_same(fading):
    model = tiny_hovle(tiny_tokenizer(), token_mixer="fading").train()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    ids = torch.arange(3, 20)[None]
    for one in (model, other):
        one(ids, labels=ids).loss.backward()
    for a, b in zip(model.embedding.parameters(), other.embedding.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)

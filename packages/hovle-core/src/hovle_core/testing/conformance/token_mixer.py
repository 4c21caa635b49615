"""Conformance of token mixers (`hovle_core.roles.TokenMixer`), alone and in the blocks of a HoVLE."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hovle_core.config import HolisticEmbeddingConfig
from hovle_core.layers import TransformerBlock
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.registry import Registry
from hovle_core.roles import TokenMixer
from hovle_core.testing.conformance.backbone import assert_close
from hovle_core.testing.conformance.base import SpecTests, build
from hovle_core.testing.tiny import tiny_embedding_config, tiny_hovle, tiny_tokenizer

LENGTH = 12


class TokenMixerTests(SpecTests):
    """What stands for self attention in the embedding's blocks. `subject` is one of it, `model` a tiny HoVLE of two
    blocks with it, every weight random."""

    kind = "token_mixer"

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> HolisticEmbeddingConfig:
        return tiny_embedding_config(64, attn_implementation="eager")

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls, config: HolisticEmbeddingConfig) -> dict[str, Any]:
        return {"config": config, "layer_idx": 0, **cls.options}

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, registry: Registry, arguments: dict[str, Any]) -> Any:
        mixer = build(registry, cls.kind, cls.name, arguments)
        return mixer.eval() if isinstance(mixer, nn.Module) else mixer

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> HovleForConditionalGeneration:
        options = dict(cls.options) or None
        return tiny_hovle(tiny_tokenizer(), token_mixer=cls.name, token_mixer_options=options)

    def test_is_a_token_mixer(self, subject: Any, config: HolisticEmbeddingConfig) -> None:
        """Blocks ask it what it keeps in a cache, and training starts its last projection at zero."""
        assert isinstance(subject, TokenMixer), (
            f"the target returns a {type(subject).__name__}: make it a subclass of hovle_core.roles.TokenMixer"
        )
        assert isinstance(getattr(subject, "o_proj", None), nn.Linear), (
            "it has no nn.Linear o_proj: name its last projection so"
        )
        assert subject.o_proj.out_features == config.hidden_size, "o_proj must give hidden_size channels"
        scalars = [name for name, p in subject.named_parameters() if p.ndim == 0]
        assert not scalars, f"{scalars} have no dimension, and FSDP cannot share them out: give them one"

    def test_mixes_tokens_and_keeps_their_shape(self, model: HovleForConditionalGeneration) -> None:
        """A block adds the result to its input; without mixing, the embedding sees one token at a time."""
        x, y = some_tokens(model), some_tokens(model)
        y[:, 0] += 1
        out, other = mixed(model, x), mixed(model, y)
        assert out.shape == x.shape, f"{list(x.shape)} became {list(out.shape)}"
        assert out.dtype == x.dtype, f"{x.dtype} became {out.dtype}"
        assert not torch.equal(out[:, 1:], other[:, 1:]), "the first token changes none of those behind it"

    def test_sees_only_what_came_before(self, model: HovleForConditionalGeneration) -> None:
        """`generate` adds tokens at the end: what was computed before them must stay."""
        x = some_tokens(model)
        y = x.clone()
        y[:, 8:] += 1
        assert_close(mixed(model, y)[:, :8], mixed(model, x)[:, :8], "later tokens change earlier ones")

    def test_all_of_it_goes_through_o_proj(self, model: HovleForConditionalGeneration) -> None:
        """A new HoVLE starts o_proj at zero, so that the LLM reads its own embeddings, and distillation rescales it."""
        mixer, x = first_mixer(model), some_tokens(model)
        weight = mixer.o_proj.weight.detach().clone()
        before = mixed(model, x)
        with torch.no_grad():
            mixer.o_proj.weight.mul_(2)
            after = mixed(model, x)
            mixer.o_proj.weight.copy_(weight)
        assert_close(after, 2 * before, "o_proj times two is not the output times two")

    def test_packed_samples_do_not_see_each_other(self, model: HovleForConditionalGeneration) -> None:
        """Training packs samples into one row; they are told by position_ids that restart."""
        x, lengths = some_tokens(model), (3, 1, LENGTH - 4)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        packed = blocks(model, x, position_ids=positions)
        alone = torch.cat([blocks(model, part) for part in x.split(lengths, dim=1)], dim=1)
        assert_close(packed, alone, "a packed sample differs from the same one alone")

    def test_padding_changes_nothing(self, model: HovleForConditionalGeneration) -> None:
        """Rows of a batch that generates are padded on the left."""
        x, short = some_tokens(model, rows=2), 7
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        mask[1, : LENGTH - short] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = blocks(model, x, position_ids=positions, attention_mask=mask)
        assert_close(padded[:1], blocks(model, x[:1]), "the padding of another row changes a row")
        alone = blocks(model, x[1:, -short:])
        assert_close(padded[1:, -short:], alone, "padding before a row changes it")

    @torch.no_grad()
    def test_cached_is_uncached(self, model: HovleForConditionalGeneration) -> None:
        """Chat decodes with a cache and training without: both must be one model."""
        ids = torch.randint(3, 200, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        pieces, start = [], 0
        for size in (6, 1, 1, 3, 1):  # a prompt, tokens one by one, and another turn
            end = start + size
            inputs = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
            pieces.append(model(**inputs, past_key_values=cache).logits)
            start = end
        cached = torch.cat(pieces, dim=1)
        assert_close(
            cached[mask.bool()], whole[mask.bool()], "with a cache, logits differ from those without"
        )

    @torch.no_grad()
    def test_generates_the_same_with_a_cache(self, model: HovleForConditionalGeneration) -> None:
        """Beams reorder what the cache holds."""
        ids = torch.randint(3, 200, (2, 5), generator=torch.Generator().manual_seed(0))
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 2}
        mask = torch.ones_like(ids)
        cached, uncached = (
            model.generate(input_ids=ids, attention_mask=mask, use_cache=use_cache, **options)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, uncached), f"{cached.tolist()} with a cache, {uncached.tolist()} without"

    def test_gradients_reach_all_of_it(self, model: HovleForConditionalGeneration) -> None:
        """What gets no gradient stays as it began, however long a run is."""
        model.zero_grad()
        out = blocks(model, some_tokens(model), grad=True)
        (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        mixer = first_mixer(model)
        without = [
            n for n, p in mixer.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
        ]
        assert not without, f"no gradient reaches {without[:3]}"
        bad = [n for n, p in mixer.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        assert not bad, f"gradients of {bad[:3]} are NaN or infinite"
        model.zero_grad()

    def test_computes_in_bfloat16(self, subject: TokenMixer, config: HolisticEmbeddingConfig) -> None:
        """`train.precision` casts parameters: what needs float32 inside must see to it, and give back what it got."""
        low = copy.deepcopy(subject).to(torch.bfloat16)
        x = torch.randn(1, LENGTH, config.hidden_size, generator=torch.Generator().manual_seed(0))
        positions, rope = torch.arange(LENGTH)[None], rotary(config)
        with torch.no_grad():
            exact = subject(x, position_ids=positions, position_embeddings=rope)
            rope = rope[0].bfloat16(), rope[1].bfloat16()
            out = low(x.bfloat16(), position_ids=positions, position_embeddings=rope)
        assert out.dtype == torch.bfloat16, f"bfloat16 became {out.dtype}"
        difference = float((out.float() - exact).norm() / exact.norm())
        assert difference < 0.05, f"bfloat16 differs from float32 by {difference:.0%}"

    def test_survives_saving_and_loading(self, model: HovleForConditionalGeneration, tmp_path: Path) -> None:
        """A checkpoint is all that is left of a run: its config names the token mixer, its weights are whole."""
        model.save_pretrained(tmp_path)
        again = HovleForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert again.config.embedding_config.token_mixer == self.name, "the config lost its name"
        x = some_tokens(model)
        assert torch.equal(blocks(again, x), blocks(model, x)), (
            "loaded again, it computes something else: what is not in the state dict is lost "
            "(register_buffer without persistent=False, or a parameter)"
        )

    def test_is_counted_without_being_computed(
        self, registry: Registry, arguments: dict[str, Any], config: HolisticEmbeddingConfig
    ) -> None:
        """`hovle plan` runs it on the meta device, where tensors have shapes and no contents."""
        with torch.device("meta"):
            mixer = build(registry, self.kind, self.name, arguments)
            x = torch.empty(1, LENGTH, config.hidden_size)
            out = mixer(
                x, position_ids=torch.arange(LENGTH)[None], position_embeddings=rotary(config, "meta")
            )
        assert out.shape == x.shape, f"{list(x.shape)} became {list(out.shape)}"


def first_mixer(model: HovleForConditionalGeneration) -> TokenMixer:
    """That of the first block."""
    return cast(TransformerBlock, model.embedding.layers[0]).self_attn


def some_tokens(model: HovleForConditionalGeneration, rows: int = 1) -> Tensor:
    """`[rows, T, D]`."""
    size = (rows, LENGTH, model.config.embedding_config.hidden_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def rotary(config: HolisticEmbeddingConfig, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosines and sines of no rotation, `[1, T, d]`."""
    size = (1, LENGTH, config.head_dim)
    return torch.ones(size, device=device), torch.zeros(size, device=device)


def blocks(
    model: HovleForConditionalGeneration,
    x: Tensor,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    grad: bool = False,
) -> Tensor:
    """The embedding's blocks on `x [B, T, D]`."""
    positions = torch.arange(x.shape[1])[None] if position_ids is None else position_ids
    with torch.set_grad_enabled(grad):
        return model.embedding.blocks(x, attention_mask, positions)


def mixed(model: HovleForConditionalGeneration, x: Tensor) -> Tensor:
    """What the first block's token mixer gives, called as the blocks call it."""
    found: list[Tensor] = []
    mixer = first_mixer(model)
    handle = mixer.register_forward_hook(lambda _module, _args, out: found.append(out))
    try:
        blocks(model, x)
    finally:
        handle.remove()
    return found[0]

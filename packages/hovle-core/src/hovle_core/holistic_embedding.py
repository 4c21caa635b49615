"""The holistic embedding: patch embed + text embed + N causal blocks -> `inputs_embeds` (paper, section 3.1).

    x_I = PatchEmbed(tiles) (+ pixel shuffle)      x_T = TextEmbed(input_ids)
    x   = CausalBlocks([x_I, x_T])                 -> what the LLM reads as if it were text

Shapes: B batch, T tokens in `input_ids` and in the LLM, E tokens in the blocks (E = T for HoVLE, more for HoVLE-HD),
N tiles, S tile side in pixels, P image tokens a tile, D hidden size.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hovle_core.attention import PACKED_ATTENTION
from hovle_core.cache import is_padded, note_padding
from hovle_core.config import HolisticEmbeddingConfig
from hovle_core.fusion import (
    Expansion,
    after_cache,
    check_placeholders,
    expand_placeholders,
    number_images,
    place_image_tokens,
)
from hovle_core.layers import RMSNorm, TransformerBlock
from hovle_core.patch_embed import PatchEmbed, PixelShuffleProjection
from hovle_core.token_mixers import token_mixer_builder

# Attention implementations that take any mask; flash attention knows only causal.
MASKED_ATTENTION = ("eager", "sdpa", "flex_attention", PACKED_ATTENTION)


class HolisticEmbedding(PreTrainedModel):
    """`input_ids [B, T]` and `pixel_values [N, 3, S, S]` -> `inputs_embeds [B, T, D]` for the LLM.

    The blocks have no final norm: the LLM's first layer brings its own.
    """

    config: HolisticEmbeddingConfig
    base_model_prefix = "embedding"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock", "PatchEmbed"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: HolisticEmbeddingConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.patch_embed = PatchEmbed(config)
        self.pixel_shuffle_proj = PixelShuffleProjection(config)
        mixer = token_mixer_builder(config)
        blocks = [TransformerBlock(config, mixer(i)) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self.recurrent_layers = [i for i, block in enumerate(blocks) if block.self_attn.is_recurrent]
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchEmbed):
            init.normal_(module.position_embedding, std=self.config.initializer_range)
            init.zeros_(module.class_embedding)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """Multiply the output by `factor` and change nothing else: the residual stream and all that writes to it.

        The blocks read through norms, so what they compute stays as it is once the norms' epsilon follows.
        """
        self.config.rms_norm_eps *= factor**2
        writers = [self.embed_tokens.weight]
        for layer in cast(Iterable[TransformerBlock], self.layers):
            layer.input_layernorm.eps = layer.post_attention_layernorm.eps = self.config.rms_norm_eps
            writers += [*layer.self_attn.o_proj.parameters(), *layer.mlp.down_proj.parameters()]
        writers += [*cast(nn.Linear, self.pixel_shuffle_proj[2]).parameters()]
        if self.config.pixel_shuffle_loc == "post":
            writers += [*self.patch_embed.parameters()]
            cast(nn.Linear, self.pixel_shuffle_proj[0]).weight.div_(factor)
        for weight in writers:
            weight.mul_(factor)

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """Tiles -> tokens as the blocks read them: `[N, P, D]`, or `[N, P · s², D]` for HoVLE-HD.

        Raises ValueError for tiles of another shape than the config's.
        """
        tile = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if tuple(pixel_values.shape[1:]) != tile:
            raise ValueError(
                f"pixel_values must be tiles [N, {', '.join(map(str, tile))}], got {list(pixel_values.shape)}"
            )
        patches = self.patch_embed(pixel_values)
        return patches if self.config.pixel_shuffle_loc == "post" else self.pixel_shuffle_proj(patches)

    def blocks(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Cache | None = None,
        is_image: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The stack alone, `[B, E, D] -> [B, E, D]`. `is_image [B, E]` matters to `mask_type="image_bidirectional"`:
        None where there are no pictures.

        Raises ValueError if the attention implementation, or a ready 4D mask, cannot hold that mask type.
        """
        image_ids = None
        if self.config.mask_type != "causal":
            self._check_mask_type(attention_mask if is_image is not None else None)
            if is_image is not None:
                past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
                image_ids = number_images(is_image, position_ids.expand(is_image.shape), past)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            block_sequence_ids=image_ids,
        )
        padding_mask = None if attention_mask is None or attention_mask.ndim != 2 else attention_mask
        position_embeddings = self.rotary_emb(x, position_ids=position_ids)
        for layer in self.layers:
            x = layer(
                x,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                padding_mask=padding_mask,
                **kwargs,
            )
        return x

    def _check_mask_type(self, attention_mask: Tensor | None) -> None:
        chosen = f"embedding_config.mask_type is {self.config.mask_type!r}"
        implementation = self.config._attn_implementation
        if implementation not in MASKED_ATTENTION:
            raise ValueError(
                f"{chosen}, which attn_implementation {implementation!r} cannot mask; choose one of {MASKED_ATTENTION} "
                'for the embedding, e.g. attn_implementation={"embedding_config": "sdpa", "text_config": '
                f"{implementation!r}}}"
            )
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"{chosen}, but attention_mask is ready-made ({attention_mask.ndim}D): pass the 2D padding mask"
            )

    def forward(
        self,
        input_ids: Tensor | None,
        is_image: Tensor,
        pixel_values: Tensor | None,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        expansion: Expansion | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """`is_image [B, T]` marks the placeholders. `attention_mask [B, past + T]` and `position_ids [B, T]` are
        the LLM's. `expansion` is the blocks' own view; where `generate` gave none it is made here (HoVLE-HD).
        `inputs_embeds [B, T, D]` stands for `embed_tokens(input_ids)`.

        Raises ValueError unless placeholders and tiles agree.
        """
        images = None if pixel_values is None else self.image_tokens(pixel_values)
        num_tiles = 0 if pixel_values is None else pixel_values.shape[0]
        if not torch.compiler.is_compiling():  # a compiled step is text, and must not wait for a count
            check_placeholders(int(is_image.sum()), num_tiles, self.config.tokens_per_tile)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        one_to_one = expansion is not None and expansion.source is None
        if self.config.block_tokens_per_placeholder > 1 and not one_to_one:
            return self._forward_post(
                x, is_image, images, position_ids, attention_mask, past_key_values, expansion
            )
        if images is not None:
            x = place_image_tokens(x, is_image, images.flatten(0, 1))
        if expansion is not None:
            attention_mask, position_ids = expansion.attention_mask, expansion.position_ids
        pictures = None if images is None else is_image
        return self.blocks(x, attention_mask, position_ids, past_key_values, pictures)

    def _forward_post(
        self,
        x: Tensor,
        is_image: Tensor,
        images: Tensor | None,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        expansion: Expansion | None,
    ) -> Tensor:
        """HoVLE-HD: the blocks see every patch; the shuffle brings each tile down to its placeholders after them."""
        repeats = self.config.block_tokens_per_placeholder
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if expansion is None and past:
            assert past_key_values is not None
            expansion = after_cache(is_image, repeats, past, attention_mask, is_padded(past_key_values))
        elif expansion is None:
            # position_ids say something only about packing, and only where nothing is padded.
            restarts = position_ids if attention_mask is None else None
            expansion = expand_placeholders(is_image, repeats, attention_mask, restarts)
        wide, wide_is_image = expansion.gather(x), expansion.gather(is_image)
        real = expansion.attention_mask[:, -wide.shape[1] :].bool()
        wide_is_image &= real
        if images is not None:
            wide = place_image_tokens(wide, wide_is_image, images.flatten(0, 1))
        padded = not bool(expansion.attention_mask.all())
        wide = self.blocks(
            wide,
            expansion.attention_mask if padded else None,
            expansion.position_ids,
            past_key_values,
            None if images is None else wide_is_image,
        ).to(x.device)  # the last block may be on another one
        if past_key_values is not None and not past:
            note_padding(past_key_values, padded)
        assert expansion.source is not None
        rows, columns = (real & ~wide_is_image).nonzero(as_tuple=True)
        out = torch.zeros_like(x)
        out = out.index_put((rows, expansion.source[rows, columns]), wide[rows, columns])
        if images is None:
            return out
        tiles = wide[wide_is_image].view(images.shape[0], -1, wide.shape[-1])
        return place_image_tokens(out, is_image, self.pixel_shuffle_proj(tiles).flatten(0, 1))

"""What `generate` asks of a HoVLE: one cache for two stacks, pictures with the prompt, the blocks' view of a batch.

Shapes: B batch, T tokens of the prompt, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationMixin
from transformers.masking_utils import create_causal_mask

from hovle_core.cache import check_room, is_padded
from hovle_core.config import ATTENTION, HovleConfig
from hovle_core.fusion import Expansion, after_cache, check_placeholders, expand_placeholders, text_step
from hovle_core.holistic_embedding import HolisticEmbedding

# An adapter's product is rounded otherwise in another number of rows: by up to 5 float32 eps of its largest value where
# measured (rank 256), and by one rounding of the result's own type.
ADAPTER_ROUNDING = 2**-18


def split_cache(cache: Cache, num_llm_layers: int, num_blocks: int) -> tuple[Cache, Cache]:
    """One cache as two views that share its layers: the embedding blocks' and the LLM's.

    The LLM's layers come first, so that the whole cache's length is that of `input_ids` for `generate`, also for
    HoVLE-HD, whose blocks cache more tokens than the LLM. Raises ValueError for a cache without its layers.
    """
    if len(cache.layers) < num_llm_layers + num_blocks:
        raise ValueError(
            f"past_key_values has {len(cache.layers)} layers, fewer than the LLM's {num_llm_layers} and the "
            f"{num_blocks} of the embedding blocks; make it with DynamicCache(config=model.config)"
        )
    return Cache(layers=cache.layers[num_llm_layers:]), Cache(layers=cache.layers[:num_llm_layers])


def _only_new(
    input_ids: Tensor,
    inputs_embeds: Tensor | None,
    cache: Cache,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> dict[str, int | None]:
    """The `next_sequence_length` of a prompt behind a cache: None to take as new all that is given.

    transformers takes `inputs_embeds` for the whole prompt; here those that are shorter than mask or positions are the
    new ones, as it has it for `input_ids`. Raises ValueError if nothing is new.
    """
    new = kwargs.get("next_sequence_length")
    if new is None:
        return {}
    prompt = input_ids if inputs_embeds is None else inputs_embeds
    # generate drops a mask that hides nothing, and has counted the positions before
    whole = kwargs.get("position_ids") if attention_mask is None else attention_mask
    if whole is not None and prompt.shape[1] < whole.shape[-1]:
        return {"next_sequence_length": None}
    if new < 1:
        raise ValueError(
            f"past_key_values hold {int(cache.get_seq_length())} tokens and the prompt {prompt.shape[1]}, so none is "
            "new: give the whole prompt, or the new tokens with the attention_mask [B, past + new] of all, or empty "
            "the cache first (past_key_values.reset())"
        )
    return {}


class HovleGenerationMixin(GenerationMixin):
    """`generate` for HovleForConditionalGeneration, which brings `config` and `embedding`."""

    config: HovleConfig
    embedding: HolisticEmbedding

    def _give_layers(self, cache: Cache) -> None:
        """Layers for a `DynamicCache()`, which takes them as they come: the blocks come first, and theirs are the last
        ones. A token mixer's are of a kind that only `DynamicCache(config=model.config)` knows."""
        blocks, llm = self.config.embedding_config, self.config.text_config.num_hidden_layers
        layer = getattr(cache, "layer_class_to_replicate", None)
        if not cache.layers and layer is not None and blocks.token_mixer == ATTENTION:
            cache.layers.extend(layer() for _ in range(llm + blocks.num_hidden_layers))

    def _split_cache(self, cache: Cache) -> tuple[Cache, Cache]:
        self._give_layers(cache)
        config = self.config
        return split_cache(
            cache, config.text_config.num_hidden_layers, config.embedding_config.num_hidden_layers
        )

    def _is_image(self, tokens: Tensor) -> Tensor:
        """Where the placeholders are, `[B, T]`; `tokens` are `input_ids [B, T]` or `inputs_embeds [B, T, D]`."""
        if tokens.ndim == 2:
            return tokens == self.config.image_token_id
        # Through the module: its weight may be offloaded, or have an adapter, which may be another one in each row.
        embed_tokens = self.embedding.embed_tokens
        ids = tokens.new_full((tokens.shape[0], 1), self.config.image_token_id, dtype=torch.long)
        placeholder = embed_tokens(ids).to(tokens.device)  # [B, 1, D]
        if tokens.dtype != placeholder.dtype:  # rounded otherwise they would be no placeholders
            raise ValueError(
                f"inputs_embeds are {tokens.dtype}, and the model's are {placeholder.dtype}: cast them to that"
            )
        if type(embed_tokens) is nn.Embedding:
            return (tokens == placeholder).all(-1)
        tolerance = torch.finfo(tokens.dtype).eps + ADAPTER_ROUNDING
        return (tokens - placeholder).abs().amax(-1) <= tolerance * placeholder.abs().amax(-1)

    def _wider_by(self, tokens: Tensor) -> int:
        """How many more tokens the blocks see than the LLM, at most, in a row of `tokens`, which hold pictures."""
        repeats = self.config.embedding_config.block_tokens_per_placeholder
        return 0 if repeats == 1 else (repeats - 1) * int(self._is_image(tokens).sum(1).max())

    @staticmethod
    def _positions(
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        if position_ids is not None:
            return position_ids
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        T = tokens.shape[1]
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            # A part of all positions has other strides in each step, for which torch.compile would compile again.
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:].contiguous()
        return (torch.arange(T, device=tokens.device) + past).unsqueeze(0)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pictures enter with the prompt only. The blocks get their own view of the batch where the LLM's does not
        do: behind a HoVLE-HD cache, and behind a static one, for which the LLM's mask is made before its forward.

        Behind a cache `inputs_embeds` are the whole prompt's, as transformers has it, or only the new ones if
        attention_mask is that of all. Raises ValueError for a prompt without new tokens, and where a static cache
        is full.
        """
        if is_first_iteration and past_key_values is not None:
            kwargs |= _only_new(input_ids, inputs_embeds, past_key_values, attention_mask, kwargs)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        prefill = is_first_iteration or past_key_values is None or not past_key_values.is_initialized
        if prefill:
            inputs["pixel_values"] = pixel_values
        wider = self.config.embedding_config.block_tokens_per_placeholder > 1
        if past_key_values is not None and (wider or past_key_values.is_compileable):
            new = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            if attention_mask is None:  # generate drops one that hides nothing
                seen = int(past_key_values.get_seq_length()) + new.shape[1]
                attention_mask = torch.ones(new.shape[0], seen, dtype=torch.long, device=new.device)
            if inputs_embeds is None or input_ids.shape[1] == attention_mask.shape[1]:
                is_image = self._is_image(input_ids)
            else:  # input_ids are what was generated since, and that is text
                is_image = F.pad(self._is_image(inputs_embeds), (0, input_ids.shape[1]))
            if past_key_values.is_compileable:
                check_room(self._split_cache(past_key_values)[1], attention_mask.shape[1], "the LLM")
            # A static cache that was reset is initialized and empty.
            behind = not prefill or int(past_key_values.get_seq_length()) > 0
            pictures = inputs.get("pixel_values") is not None
            inputs["expansion"] = self._blocks_view(
                is_image, attention_mask, past_key_values, new.shape[1], behind, pictures
            )
        return inputs

    def _blocks_view(
        self, is_image: Tensor, attention_mask: Tensor, cache: Cache, new: int, behind: bool, pictures: bool
    ) -> Expansion:
        """The blocks' view of the last `new` tokens of a batch, where `forward` could not tell by itself.

        is_image: `[B, t]` of the last t tokens, which may leave out cached ones. `behind`: tokens are cached;
        `pictures`: there are some among the new tokens.
        """
        repeats = self.config.embedding_config.block_tokens_per_placeholder
        blocks_cache, _ = self._split_cache(cache)
        if repeats == 1:
            positions = self._positions(is_image[:, -new:], attention_mask, None, None)
            view = Expansion(None, attention_mask, positions)
        elif not behind:
            view = expand_placeholders(is_image, repeats, attention_mask)
        elif pictures or is_image.shape[1] < attention_mask.shape[1]:
            past = int(blocks_cache.get_seq_length())
            view = after_cache(is_image[:, -new:], repeats, past, attention_mask, is_padded(blocks_cache))
        else:
            view = text_step(is_image, repeats, attention_mask, new)
        if pictures or not (behind and cache.is_compileable):
            return view
        check_room(blocks_cache, view.attention_mask.shape[1], "the embedding blocks")
        # The mask takes shape, type and device of what the blocks will read; the weights may be offloaded.
        like = torch.empty(is_image.shape[0], new, 0, dtype=self.embedding.dtype, device=is_image.device)
        mask = create_causal_mask(
            config=self.config.embedding_config,
            inputs_embeds=like,
            attention_mask=view.attention_mask,
            past_key_values=blocks_cache,
            position_ids=view.position_ids,
        )
        return Expansion(None, mask, view.position_ids)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Beams and several answers to a prompt repeat its tiles with it: all of a row's, then all of them again."""
        pixel_values = kwargs.pop("pixel_values", None)
        if expand_size > 1 and pixel_values is not None:
            prompt = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else input_ids
            assert prompt is not None
            tiles = self._is_image(prompt).sum(1) // self.config.embedding_config.tokens_per_tile
            placeholders = int(self._is_image(prompt).sum())
            check_placeholders(placeholders, len(pixel_values), self.config.embedding_config.tokens_per_tile)
            rows = pixel_values.split(tiles.tolist())
            pixel_values = torch.cat([row.repeat(expand_size, 1, 1, 1) for row in rows])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, "pixel_values": pixel_values}

"""HoVLE: the holistic embedding in front of an unchanged causal LLM, as one transformers model.

Shapes: B batch, T tokens in `input_ids`, N tiles of all samples, S tile side in pixels, V vocabulary.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from hovle_core import attention
from hovle_core.cache import grow_in_place
from hovle_core.config import HolisticEmbeddingConfig, HovleConfig
from hovle_core.fusion import Expansion, expand_placeholders
from hovle_core.holistic_embedding import HolisticEmbedding
from hovle_core.hub import HUB_ARGUMENTS, local_folder
from hovle_core.layers import TransformerBlock
from hovle_core.losses import IGNORE_INDEX, causal_lm_loss
from hovle_core.official import is_released, read_released_config
from hovle_core.official_tensors import load_released

attention.register()


def split_cache(cache: Cache, num_llm_layers: int) -> tuple[Cache, Cache]:
    """One cache as two views that share its layers: the embedding blocks' and the LLM's.

    The LLM's layers come first, so that the whole cache's length is that of `input_ids` for `generate`, also for
    HoVLE-HD, whose blocks cache more tokens than the LLM. Raises ValueError for a cache without its layers.
    """
    if len(cache.layers) <= num_llm_layers:
        raise ValueError(
            f"past_key_values has {len(cache.layers)} layers, fewer than the LLM's {num_llm_layers} and the embedding "
            "blocks'; make it with DynamicCache(config=model.config)"
        )
    return Cache(layers=cache.layers[num_llm_layers:]), Cache(layers=cache.layers[:num_llm_layers])


class HovleForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """`model(input_ids, pixel_values)` -> logits; `model.generate(...)` with one cache for blocks and LLM.

    `from_pretrained` reads our own format and the released one (`config.json` with `embedding_config`),
    without remote code and from safetensors only.
    """

    config: HovleConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: HovleConfig):
        super().__init__(config)
        self.embedding = HolisticEmbedding(config.embedding_config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()
        # A placeholder without a picture has no meaning: never sample one.
        self.generation_config.suppress_tokens = [config.image_token_id]

    @classmethod
    def from_language_model(
        cls, language_model: PreTrainedModel, embedding_config: HolisticEmbeddingConfig, image_token_id: int
    ) -> "HovleForConditionalGeneration":
        """A new HoVLE around an LLM: random blocks, the text embedding a copy of the LLM's own.

        The last projection of both branches of every block starts at zero, so that an untrained embedding hands
        the LLM its own text embeddings. Raises ValueError if vocabulary or width do not fit the LLM.
        """
        table = language_model.get_input_embeddings().weight
        if embedding_config.vocab_size != table.shape[0]:
            raise ValueError(
                f"embedding_config.vocab_size {embedding_config.vocab_size} must equal the LLM's {table.shape[0]}"
            )
        config = HovleConfig(
            text_config=language_model.config,
            embedding_config=embedding_config,
            image_token_id=image_token_id,
        )
        model = cls(config)
        model.language_model.load_state_dict(language_model.state_dict())
        model.generation_config.eos_token_id = language_model.generation_config.eos_token_id
        model.generation_config.pad_token_id = language_model.generation_config.pad_token_id
        with torch.no_grad():
            model.embedding.embed_tokens.weight.copy_(table)
            for block in cast(Iterable[TransformerBlock], model.embedding.layers):
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        config: HovleConfig | None = None,
        **kwargs: Any,
    ) -> "HovleForConditionalGeneration":
        """As transformers', for a folder or hub id in our format or the released one.

        Raises ValueError for remote code, pickles, or tensors that do not fit the config; FileNotFoundError, saying
        what to do, where there is no such folder or repository.
        """
        if kwargs.pop("trust_remote_code", False):
            raise ValueError(
                "trust_remote_code must stay False: hovle-core runs its own code for released checkpoints"
            )
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError(
                "use_safetensors must stay True: pickled weights can run code; convert them first"
            )
        name = pretrained_model_name_or_path
        if name is None:
            return super().from_pretrained(None, *args, config=config, **kwargs)
        hub = {argument: kwargs.pop(argument) for argument in HUB_ARGUMENTS if argument in kwargs}
        folder = local_folder(name, weights=True, **hub)
        if is_released(folder):
            config = config or read_released_config(folder)
            state_dict = load_released(folder, config)
            loaded = super().from_pretrained(None, *args, config=config, state_dict=state_dict, **kwargs)
        else:
            loaded = super().from_pretrained(folder, *args, config=config, use_safetensors=True, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info
        model.name_or_path = model.config.name_or_path = str(name)  # the hub id, not the cache's folder
        return loaded

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        expansion: Expansion | None = None,
    ) -> Tensor:
        """The holistic embedding's output, the LLM's `inputs_embeds [B, T, D]`. Arguments as in `forward`."""
        position_ids = self._positions(input_ids, attention_mask, position_ids, past_key_values)
        stacks = (self.embedding.config._attn_implementation, self.language_model.config._attn_implementation)
        attention.check_packing(position_ids, attention_mask, past_key_values is not None, stacks)
        return self.embedding(
            input_ids,
            input_ids == self.config.image_token_id,
            pixel_values,
            position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            expansion=expansion,
        )

    @staticmethod
    def _positions(
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        if position_ids is not None:
            return position_ids
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        T = input_ids.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        return (torch.arange(T, device=input_ids.device) + past).unsqueeze(0)

    def forward(
        self,
        input_ids: Tensor = None,  # type: ignore[assignment]  # needed; a default as transformers' forwards have
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        expansion: Expansion | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        input_ids: `[B, T]`, with `tokens_per_tile` placeholders for each tile, in order (for HoVLE-HD too).
        pixel_values: `[N, 3, S, S]`, normalised tiles of all samples in order; None for text only.
        attention_mask: `[B, past + T]`, 0 at padding (pad on the left to generate).
        position_ids: `[B, T]`; restarts mark packed samples, which then cannot see each other, whatever the attention
            implementation. They go without attention_mask and cache.
        labels: `[B, T]`, -100 where there is no target; gives the mean loss over targets (`num_items_in_batch`, a
            transformers keyword, sets another divisor). In training there are then no logits: the head runs at the
            targets only.
        logits_to_keep: as in transformers; an index `[K]` computes logits at those positions only, an empty one none.
        expansion: the blocks' view of a padded HoVLE-HD batch behind a cache; made by `generate`.

        Raises ValueError if placeholders and tiles disagree (with both counts), or if packed rows meet a cache or an
        attention_mask.
        """
        if kwargs.get("cu_seq_lens_q") is not None and position_ids is None:
            raise ValueError(
                "cu_seq_lens_q is given without position_ids: packed samples are told by position_ids that restart, "
                "which every attention implementation reads; pass both, or position_ids alone"
            )
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        blocks_cache = llm_cache = None
        if past_key_values is not None:
            grow_in_place(past_key_values)
            blocks_cache, llm_cache = self._split(past_key_values)
        position_ids = self._positions(input_ids, attention_mask, position_ids, llm_cache)
        inputs_embeds = self.embed(
            input_ids, pixel_values, attention_mask, position_ids, blocks_cache, expansion
        )
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": llm_cache,
            "use_cache": past_key_values is not None,
        }
        no_logits = isinstance(logits_to_keep, Tensor) and logits_to_keep.numel() == 0
        if labels is not None and (self.training or no_logits):
            divisor = kwargs.pop("num_items_in_batch", None)
            loss = causal_lm_loss(self.language_model, labels, **inputs, **kwargs)
            loss = loss / ((labels[:, 1:] != IGNORE_INDEX).sum() if divisor is None else divisor)
            return CausalLMOutputWithPast(loss=loss, past_key_values=past_key_values)
        outputs = self.language_model(**inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        outputs.past_key_values = past_key_values  # the whole cache, not the LLM's view of it
        return outputs

    def _split(self, cache: Cache) -> tuple[Cache, Cache]:
        return split_cache(cache, self.config.text_config.num_hidden_layers)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pictures enter with the prompt only; HoVLE-HD also learns how far each row's pictures expand."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        repeats = self.config.embedding_config.block_tokens_per_placeholder
        if (
            repeats > 1
            and not is_first_iteration
            and attention_mask is not None
            and kwargs.get("use_cache", True)
        ):
            whole = expand_placeholders(input_ids == self.config.image_token_id, repeats, attention_mask)
            new = inputs["input_ids"].shape[1]
            steps = torch.arange(new, device=input_ids.device).expand(input_ids.shape[0], new)
            inputs["expansion"] = Expansion(steps, whole.attention_mask, whole.position_ids[:, -new:])
        return inputs


AutoModel.register(HovleConfig, HovleForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(HovleConfig, HovleForConditionalGeneration, exist_ok=True)

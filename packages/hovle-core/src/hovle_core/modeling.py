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
    AutoModelForMultimodalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME, can_return_tuple

from hovle_core import attention
from hovle_core.cache import grow_in_place, hold_states, make_room
from hovle_core.config import HolisticEmbeddingConfig, HovleConfig
from hovle_core.fusion import Expansion
from hovle_core.generation import HovleGenerationMixin
from hovle_core.holistic_embedding import HolisticEmbedding
from hovle_core.hub import HUB_ARGUMENTS, local_folder
from hovle_core.layers import TransformerBlock
from hovle_core.loading import ADAPTER_CONFIG, add_adapter, base_of, check_adapter, check_whole, is_adapter
from hovle_core.losses import IGNORE_INDEX, causal_lm_loss, within_samples
from hovle_core.official import is_released, read_released_config
from hovle_core.official_tensors import load_released
from hovle_core.tensor_files import TensorFiles

attention.register()


class HovleForConditionalGeneration(PreTrainedModel, HovleGenerationMixin):
    """`model(input_ids, pixel_values)` -> logits; `model.generate(...)` with one cache for blocks and LLM.

    `from_pretrained` reads our own format and the released one (`config.json` with `embedding_config`),
    without remote code and from safetensors only.
    """

    config: HovleConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock", "PatchEmbed"]
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
            # Through the module: Gemma's scales what its table holds.
            vocabulary = torch.arange(table.shape[0], device=table.device)
            model.embedding.embed_tokens.weight.copy_(language_model.get_input_embeddings()(vocabulary))
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
        """As transformers', for a folder or hub id in our format or the released one, and for one of a peft adapter,
        whose base model is loaded with it. An adapter that lies beside a model is put on it.

        Raises ValueError for remote code, tensors that do not fit the config, and a released checkpoint's pickles
        (OSError, transformers' own, for a folder in our format that holds nothing else); FileNotFoundError, saying
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
        folder = local_folder(name, weights=True, may_be_adapter=True, **hub)
        adapter = folder if (folder / ADAPTER_CONFIG).is_file() else None
        wants_info = kwargs.pop("output_loading_info", False)
        adapter_name, base = None, base_of(folder) if is_adapter(folder) else None
        if adapter is not None:
            check_adapter(adapter)  # before a model is loaded
            adapter_name = kwargs.pop("adapter_name", None)
        if base is not None:
            name, revision = base
            base_hub = {argument: value for argument, value in hub.items() if argument != "subfolder"}
            folder = local_folder(name, weights=True, **base_hub | {"revision": revision})
        model, info = cls._without_adapter(str(name), folder, *args, config=config, **kwargs)
        if adapter is not None:
            info = add_adapter(model, adapter, adapter_name)  # what transformers reports as well
        model.name_or_path = model.config.name_or_path = str(name)  # the hub id, not the cache's folder
        loaded: Any = (model, info) if wants_info else model  # the info transformers does not declare
        return loaded

    @classmethod
    def _without_adapter(
        cls, name: str, folder: Path, *args: Any, config: HovleConfig | None, **kwargs: Any
    ) -> "tuple[HovleForConditionalGeneration, dict[str, Any]]":
        """The model in `folder` without an adapter that lies beside it, and transformers' report, which is checked."""
        may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        # transformers would raise without the tensor's name; check_whole has it.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        source: Path | None = None
        if is_released(folder):
            from hovle_core.convert import generation_from_released

            own_config = read_released_config(folder) if config is None or may_mismatch else config
            kwargs["state_dict"] = load_released(folder, own_config)
            config = config or own_config
            if kwargs.get("generation_config") is None:
                kwargs["generation_config"] = generation_from_released(folder, config)
        elif (folder / ADAPTER_CONFIG).is_file():
            # From the folder transformers would load the adapter, too, and report on nothing else.
            with TensorFiles(folder) as tensors:
                kwargs["state_dict"] = {tensor: tensors[tensor] for tensor in tensors.shapes}
            config = config or HovleConfig.from_pretrained(folder)
            if kwargs.get("generation_config") is None and (folder / GENERATION_CONFIG_NAME).is_file():
                kwargs["generation_config"] = GenerationConfig.from_pretrained(folder)
        else:
            source, kwargs["use_safetensors"] = folder, True
        loaded: Any = super().from_pretrained(source, *args, config=config, **kwargs)
        model, info = loaded
        check_whole(name, info, may_mismatch)
        return model, info

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, **kwargs: Any) -> nn.Embedding:
        """Both tables: the blocks' and the LLM's own, whose head goes with it. Arguments as in transformers."""
        self.language_model.resize_token_embeddings(new_num_tokens, **kwargs)
        return self.embedding.resize_token_embeddings(new_num_tokens, **kwargs)

    def embed(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        expansion: Expansion | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The holistic embedding's output, which the LLM reads, `[B, T, D]`. Arguments as in `forward`."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        position_ids = self._positions(tokens, attention_mask, position_ids, past_key_values)
        stacks = (self.embedding.config._attn_implementation, self.language_model.config._attn_implementation)
        attention.check_packing(position_ids, attention_mask, past_key_values is not None, stacks)
        return self.embedding(
            input_ids,
            self._is_image(tokens),
            pixel_values,
            position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            expansion=expansion,
            inputs_embeds=inputs_embeds,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
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
        inputs_embeds: `[B, T, D]` in place of input_ids: what `get_input_embeddings()(input_ids)` gives, placeholders
            (known by their embedding) included. It enters the embedding blocks; what the LLM reads is `embed`'s.
        expansion: the blocks' view of a batch behind a HoVLE-HD or a static cache; made by `generate`.

        Raises ValueError if placeholders and tiles disagree (with both counts), if packed rows meet a cache or an
        attention_mask, or unless one of input_ids and inputs_embeds is given.
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
            self._give_layers(past_key_values)
            grow_in_place(past_key_values)
            hold_states(
                past_key_values, self.config.text_config.num_hidden_layers, self.embedding.recurrent_layers
            )
            blocks_cache, llm_cache = self._split_cache(past_key_values)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is not None:  # else embed refuses
            position_ids = self._positions(tokens, attention_mask, position_ids, llm_cache)
            if blocks_cache is not None and llm_cache is not None and pixel_values is not None:
                make_room(blocks_cache, llm_cache, tokens.shape[1], self._wider_by(tokens))
        embedded = self.embed(
            input_ids, pixel_values, attention_mask, position_ids, blocks_cache, expansion, inputs_embeds
        )
        inputs = {
            "inputs_embeds": embedded,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": llm_cache,
            "use_cache": past_key_values is not None,
        }
        if labels is not None:  # for the mean over targets, and for the LLM's own loss
            labels = within_samples(labels, position_ids, attention_mask)
        no_logits = isinstance(logits_to_keep, Tensor) and logits_to_keep.numel() == 0
        if labels is not None and (self.training or no_logits):
            divisor = kwargs.pop("num_items_in_batch", None)
            loss = causal_lm_loss(self.language_model, labels, **inputs, **kwargs)
            loss = loss / ((labels[:, 1:] != IGNORE_INDEX).sum() if divisor is None else divisor)
            return CausalLMOutputWithPast(loss=loss, past_key_values=past_key_values)
        outputs = self.language_model(**inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        outputs.past_key_values = past_key_values  # the whole cache, not the LLM's view of it
        return outputs


AutoModel.register(HovleConfig, HovleForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(HovleConfig, HovleForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(HovleConfig, HovleForConditionalGeneration, exist_ok=True)

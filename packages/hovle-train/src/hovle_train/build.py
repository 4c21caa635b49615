"""From a recipe's `model` section to a model and its processor."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hovle_core.backbones import name_what_fails
from hovle_core.config import HolisticEmbeddingConfig
from hovle_core.image_processor import HovleImageProcessor
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import IMAGE_CONTEXT, HovleProcessor
from hovle_core.registry import Registry
from hovle_core.roles import LLMBackbone, TokenizerProvider
from hovle_core.vocabulary import conflicts, fit_embeddings
from hovle_train.recipe_sections import ModelConfig
from hovle_train.runs import resolve_checkpoint

# What a new embedding takes over from the LLM unless the recipe says otherwise.
_FROM_LLM = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "max_position_embeddings", "rope_parameters",
)  # fmt: skip


def build_backbone(config: ModelConfig, registry: Registry) -> LLMBackbone:
    """The recipe's backbone. Raises ValueError if there is none, or if the plugin returns something else."""
    if config.backbone is None:
        raise ValueError("model.backbone is needed to start a new model (or model.init_from to continue one)")
    backbone = registry.build("backbone", config.backbone.name, **_resolved(config.backbone.options))
    if not isinstance(backbone, LLMBackbone):
        raise ValueError(
            f"backbone {config.backbone.name!r} is a {type(backbone).__name__}, not an LLMBackbone"
        )
    return backbone


def embedding_config(config: ModelConfig, llm: PreTrainedConfig, vocab_size: int) -> HolisticEmbeddingConfig:
    """The new embedding's config: the LLM's sizes, overridden by the recipe."""
    fields: dict[str, Any] = {
        name: getattr(llm, name) for name in _FROM_LLM if getattr(llm, name, None) is not None
    }
    return HolisticEmbeddingConfig(**{**fields, "vocab_size": vocab_size, **config.embedding})


def build_tokenizer(config: ModelConfig, registry: Registry) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, or the one that `model.tokenizer` names.

    Raises ValueError if the plugin returns something else, and unless `model.resize_embeddings` is set, for a
    tokenizer whose ids mean other tokens to the LLM, or that has more tokens than the LLM has embeddings.
    """
    backbone = build_backbone(config, registry)
    if config.tokenizer is None:
        return backbone.tokenizer()
    name = config.tokenizer.name
    provider = registry.build("tokenizer", name, **_resolved(config.tokenizer.options))
    if not isinstance(provider, TokenizerProvider):
        raise ValueError(f"tokenizer {name!r} is a {type(provider).__name__}, not a TokenizerProvider")
    tokenizer = provider.tokenizer()
    if config.resize_embeddings:
        return tokenizer
    if other := conflicts(tokenizer, backbone.tokenizer()):
        raise ValueError(
            f"model.tokenizer {name!r} gives {len(other)} tokens ids that are other tokens to the LLM of "
            f"model.backbone ({', '.join(map(repr, other[:3]))}): leave model.tokenizer out, or set "
            "model.resize_embeddings: true to lay the LLM's embeddings out anew, which it must then be trained on"
        )
    # A backbone's embeddings have room for its own tokenizer, whose picture tokens its config may not count.
    room = max(backbone.config().vocab_size, len(backbone.tokenizer()))
    if len(tokenizer) > room:
        raise ValueError(
            f"model.tokenizer {name!r} has {len(tokenizer)} tokens with the picture tokens, and the LLM of "
            f"model.backbone has {room} embeddings: choose a tokenizer that this LLM was made with, a backbone with a "
            "larger vocabulary, or model.resize_embeddings: true"
        )
    return tokenizer


def build_llm(config: ModelConfig, registry: Registry, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The backbone's LLM in float32, laid out for `tokenizer` where `model.resize_embeddings` says so."""
    backbone = build_backbone(config, registry)
    llm = backbone.model()
    if config.resize_embeddings:
        fit_embeddings(llm, backbone.tokenizer(), tokenizer)
    return llm


def _resolved(options: dict[str, Any]) -> dict[str, Any]:
    """Options with a `path` to a finished run led to its checkpoint."""
    return {**options, "path": resolve_checkpoint(options["path"])} if "path" in options else options


def build_processor(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, embedding: HolisticEmbeddingConfig
) -> HovleProcessor:
    """The processor that goes with an embedding."""
    image_processor = HovleImageProcessor(
        tile_size=embedding.image_size,
        image_mean=embedding.image_mean,
        image_std=embedding.image_std,
        **config.image.model_dump(),
    )
    return HovleProcessor(image_processor, tokenizer, tokens_per_tile=embedding.tokens_per_tile)


def build_hovle(
    config: ModelConfig, registry: Registry, seed: int
) -> tuple[HovleForConditionalGeneration, HovleProcessor]:
    """The model of a recipe in float32, from a checkpoint or new around a backbone, and its processor.

    Raises ValueError naming the setting for a checkpoint that is not there, lacks its weights, or is damaged.
    """
    if config.init_from is not None:
        path = resolve_checkpoint(config.init_from)
        with name_what_fails(f"model.init_from {path!r}"):
            model = HovleForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
            processor = HovleProcessor.from_pretrained(path)
    else:
        if "token_mixer" in config.embedding:  # a wrong name is told before anything is loaded
            registry.get("token_mixer", config.embedding["token_mixer"])
        tokenizer = build_tokenizer(config, registry)
        llm = build_llm(config, registry, tokenizer)
        embedding = embedding_config(config, llm.config, llm.get_input_embeddings().weight.shape[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = HovleForConditionalGeneration.from_language_model(
                llm, embedding, tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
            )
        if config.blocks_from_llm:
            start_from_llm(model)
        processor = build_processor(config, tokenizer, embedding)
    prepare_for_training(model, config)
    return model, processor


@torch.no_grad()
def start_from_llm(model: HovleForConditionalGeneration) -> None:
    """Copy the LLM's first layers into the embedding blocks: on text they then compute what those layers do.

    Raises ValueError for an LLM whose layers are no such blocks (biases, norms of their own, another size or
    activation), or that has fewer of them.
    """
    layers, blocks = model.language_model.get_decoder().layers, model.embedding.layers
    why = f"model.blocks_from_llm: the embedding's {len(blocks)} blocks cannot start from this LLM"
    if len(layers) < len(blocks):
        raise ValueError(f"{why} of {len(layers)} layers: lower model.embedding.num_hidden_layers")
    wanted, given = ({k: v.shape for k, v in s[0].state_dict().items()} for s in (blocks, layers))
    if wanted != given:
        differ = sorted(k for k in wanted.keys() | given.keys() if wanted.get(k) != given.get(k))
        raise ValueError(
            f"{why} ({model.config.text_config.model_type}), whose layers differ in {', '.join(differ[:4])}: leave it "
            "out, or fit model.embedding (intermediate_size, heads, attention_bias) where it can say that"
        )
    for field in ("hidden_act", "rms_norm_eps", "rope_parameters"):
        ours = getattr(model.config.embedding_config, field)
        if ours != (theirs := getattr(model.config.text_config, field, None)):
            raise ValueError(f"{why}: model.embedding.{field} is {ours!r} and the LLM's is {theirs!r}")
    for block, layer in zip(blocks, layers, strict=False):
        block.load_state_dict(layer.state_dict())


def find_hovle(module: nn.Module) -> HovleForConditionalGeneration:
    """The HoVLE in what a stage trains. Raises ValueError where there is none."""
    for part in module.modules():
        if isinstance(part, HovleForConditionalGeneration):
            return part
    raise ValueError(f"train.drop_path is for a HoVLE, and {type(module).__name__} holds none: leave it out")


def prepare_for_training(model: PreTrainedModel, config: ModelConfig) -> None:
    """Attention implementation and activation checkpointing, as the recipe asks.

    Raises ValueError naming `model.attention` where this machine does not have it.
    """
    try:
        model.set_attn_implementation(config.attention)
    except (ImportError, ValueError) as error:
        raise ValueError(f"model.attention {config.attention!r}: {error}") from error
    if config.activation_checkpointing:
        # The oldest transformers that hovle-train takes knows it by its former name.
        name = "activation_checkpointing_enable"
        getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    model.config.use_cache = False

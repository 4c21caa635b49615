"""The released checkpoints' `config.json` as ours, and back (hovle-spec, section 1). No remote code on either way.

The released LLM is an InternLM2, which is a Llama whose q, k and v are stored as one grouped matrix; Llama and Qwen2
are known as well. Tensors: `official_tensors`; tokenizers: `official_processor`; whole folders: `convert`.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from hovle_core.config import ATTENTION, IMAGENET_MEAN, IMAGENET_STD, HolisticEmbeddingConfig, HovleConfig

if TYPE_CHECKING:
    from hovle_core.image_processor import HovleImageProcessor

RELEASED_MODEL_TYPE = "internvl_chat"
INTERNLM2 = "internlm2"

_CONFIG_CLASS: dict[str, type[PreTrainedConfig]] = {
    INTERNLM2: LlamaConfig,
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
}
_ARCHITECTURE = {INTERNLM2: "InternLM2ForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# transformers 4 had two fields where 5 has one, and derived the others.
_OLD_ROPE = ("rope_theta", "rope_scaling")
_NEW_FIELDS = ("rope_parameters", "layer_types", "head_dim")
# What a released `config.json` says in any case, by section.
_REQUIRED = {"embedding_config": ("img_context_token_id", "image_size"), "llm_config": ("model_type",)}
# The parts of a released `config.json` that are patched field by field; any other value is replaced whole.
_SECTIONS = ("embedding_config", "llm_config")
# The scaled RoPE of the released blocks and of InternLM2; each takes a factor and nothing else.
_INTERNLM2_ROPE = ("linear", "dynamic")
# What an InternLM2 has no word for.
_NOT_INTERNLM2 = ("mlp_bias", "pretraining_tp", "attention_dropout")

# Switches of the released embedding that every released checkpoint has alike; other values are another model.
_EMBEDDING_SWITCHES = {
    "use_pixel_shuffle_proj": True,
    "use_2d_sincos_pos_embed": False,
    "use_ls": False,
    "mlp_bias": False,
}
# What the released code does without being told.
_UNSAID = {
    "image_mean": list(IMAGENET_MEAN),
    "image_std": list(IMAGENET_STD),
    "mask_type": "causal",
    "token_mixer": ATTENTION,
    "token_mixer_options": None,
}
# What the released code wants to be told of a HoVLE that was not made from a released one.
_NEW_EMBEDDING = {
    **_EMBEDDING_SWITCHES,
    "model_type": "holistic_embedding",
    "use_autoregressive_loss": False,
    "use_img_start_end_tokens": True,
    "special_token_maps": {},
    "pretraining_tp": 1,
}
_NEW_TOP = {
    "architectures": ["InternVLChatModel"],
    "model_type": RELEASED_MODEL_TYPE,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internlm2-chat",
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
}


def is_released(folder: str | Path) -> bool:
    """Whether `folder` holds a checkpoint in the released format."""
    config = Path(folder) / "config.json"
    return (
        config.is_file()
        and "embedding_config" in (raw := json_object(config))
        and (raw.get("model_type") == RELEASED_MODEL_TYPE)
    )


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds. Raises ValueError naming it if that is no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, and a JSON object is needed")
    return found


def read_released_config(folder: Path) -> HovleConfig:
    """`config_from_released` of a folder's `config.json`. Raises ValueError, also for one that is malformed."""
    path = folder / "config.json"
    released = json_object(path)
    for section, names in _REQUIRED.items():
        if not isinstance(fields := released.get(section), dict):
            raise ValueError(f"{path}: {section} is {fields!r}, and an object is needed")
        if missing := [name for name in names if name not in fields]:
            raise ValueError(f"{path}: {section} lacks {', '.join(missing)}")
    try:
        return config_from_released(released)
    except (
        LookupError,
        TypeError,
        AttributeError,
        StrictDataclassError,
    ) as error:  # transformers' own, of its fields
        raise ValueError(f"{path} has a field that is no config's: {error}") from error


def config_from_released(released: Mapping[str, Any]) -> HovleConfig:
    """A released `config.json` as a HovleConfig, which keeps a copy of it as `released`.

    Raises ValueError naming a field with a value that this model has no counterpart for.
    """
    embedding = released["embedding_config"]
    for name, value in _EMBEDDING_SWITCHES.items():
        if embedding.get(name, value) != value:
            raise ValueError(
                f"embedding_config.{name} is {embedding[name]!r}; only {value!r} is known, as in the released models"
            )
    size = released.get("force_image_size") or embedding["image_size"]
    if size != embedding["image_size"]:
        raise ValueError(
            f"force_image_size {size} must equal embedding_config.image_size {embedding['image_size']}"
        )
    blocks = HolisticEmbeddingConfig(
        **_kept(HolisticEmbeddingConfig, embedding, {"llm_vocab_size": "vocab_size"})
    )
    _internlm2_rope_scaling(blocks, "embedding_config")  # so that there is a way back
    return HovleConfig(
        embedding_config=blocks,
        text_config=llm_config_from_released(released["llm_config"]),
        image_token_id=embedding["img_context_token_id"],
        dtype=released.get("torch_dtype"),
        released=copy.deepcopy(dict(released)),
    )


def llm_config_from_released(llm: Mapping[str, Any]) -> PreTrainedConfig:
    """`llm_config` as a transformers config; an InternLM2 becomes the Llama that it is."""
    kind = llm.get("model_type")
    if kind not in _CONFIG_CLASS:
        raise ValueError(f"llm_config.model_type {kind!r} is not known; known are {sorted(_CONFIG_CLASS)}")
    kept = _kept(_CONFIG_CLASS[kind], llm, {"bias": "attention_bias"} if kind == INTERNLM2 else {})
    config = _CONFIG_CLASS[kind](
        **kept, architectures=[_CONFIG_CLASS[kind].__name__.replace("Config", "ForCausalLM")]
    )
    if kind == INTERNLM2:
        _internlm2_rope_scaling(config, "llm_config")
    return config


def _kept(
    config_class: type[PreTrainedConfig], released: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    """The fields of `released` that the config class itself has. Dumps of transformers 4 hold dozens of others.

    They are copies: transformers writes rope_type and rope_theta into the dict that it is given.
    """
    known = (own_fields(config_class) | set(_OLD_ROPE)) - {"layer_types"}
    renamed = {names.get(name, name): value for name, value in released.items()}
    return {name: copy.deepcopy(value) for name, value in renamed.items() if name in known}


def own_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """The fields of a config class that are its own and not every config's."""
    return set(config_class.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)


def llm_kind(config: HovleConfig) -> str:
    """`llm_config.model_type` of this model in the released format: that of the checkpoint it comes from, if any.

    Raises ValueError for an LLM that the released code does not know.
    """
    kind = (config.released or {}).get("llm_config", {}).get("model_type")
    if kind is not None and type(config.text_config) is _CONFIG_CLASS[kind]:
        return kind
    kind = config.text_config.model_type
    if kind not in _CONFIG_CLASS:
        raise ValueError(
            f"the released format has no LLM of type {kind!r}; it has {sorted(_CONFIG_CLASS)}: keep this checkpoint "
            "in hovle's own format"
        )
    return kind


def config_to_released(
    config: HovleConfig, image_processor: "HovleImageProcessor | None" = None
) -> dict[str, Any]:
    """A HovleConfig as a released `config.json`: the one it comes from with what has changed since, or a new one.

    `image_processor` says how pictures are tiled. Raises ValueError for what the released format cannot say.
    """
    if config.released is None:
        return _written(config, image_processor)
    origin = config_from_released(config.released)
    before = _written(
        origin, None if image_processor is None else image_processor_from_released(config.released)
    )
    return _patched(copy.deepcopy(config.released), before, _written(config, image_processor))


def _patched(
    original: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, Any]:
    """`original` with the values that differ between `before` and `now`."""
    patched = dict(original)
    for name, value in now.items():
        if name in _SECTIONS:
            patched[name] = _patched(original[name], before[name], value)
        elif name not in before or before[name] != value:
            patched[name] = value
    return patched


def _written(config: HovleConfig, image_processor: "HovleImageProcessor | None") -> dict[str, Any]:
    """The released `config.json` of a HoVLE, written from nothing."""
    embedding, llm, kind = config.embedding_config, config.text_config, llm_kind(config)
    if kind == INTERNLM2 and llm.mlp_bias:
        raise ValueError("text_config.mlp_bias is True, and an InternLM2 has none")
    for part, stack in (("embedding_config", embedding), ("text_config", llm)):
        head_dim = getattr(stack, "head_dim", None)
        if head_dim not in (None, stack.hidden_size // stack.num_attention_heads):
            raise ValueError(
                f"{part}.head_dim {head_dim} is not hidden_size / num_attention_heads, as the released format has it"
            )
    dtype = {} if config.dtype is None else {"torch_dtype": str(config.dtype).removeprefix("torch.")}
    blocks = {
        **_old_fields(embedding),
        "rope_scaling": _internlm2_rope_scaling(embedding, "embedding_config"),
    }
    for name, value in _UNSAID.items():
        if blocks.pop(name) != value:
            raise ValueError(
                f"embedding_config.{name} is {getattr(embedding, name)!r}, and the released code knows only {value!r}: "
                "keep this checkpoint in hovle's own format"
            )
    return {
        **_NEW_TOP,
        "embedding_config": {
            **_NEW_EMBEDDING,
            "llm_vocab_size": blocks.pop("vocab_size"),
            **blocks,
            "llm_hidden_size": llm.hidden_size,
            "img_context_token_id": config.image_token_id,
        },
        "llm_config": {**_old_llm(llm, kind), **dtype},
        "downsample_ratio": embedding.downsample_ratio,
        "force_image_size": embedding.image_size,
        **({} if image_processor is None else _tiling(image_processor)),
        **dtype,
    }


def _old_llm(llm: PreTrainedConfig, kind: str) -> dict[str, Any]:
    fields = _old_fields(llm)
    if kind == INTERNLM2:
        fields = {name: value for name, value in fields.items() if name not in _NOT_INTERNLM2}
        fields["bias"] = fields.pop("attention_bias")
        fields["rope_scaling"] = _internlm2_rope_scaling(llm, "text_config")
    return {"model_type": kind, "architectures": [_ARCHITECTURE[kind]], **fields}


def _old_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's own fields with the names of transformers 4."""
    names = sorted(own_fields(type(config)) - set(_NEW_FIELDS))
    return {
        **{name: getattr(config, name) for name in names},
        "rope_theta": (config.rope_parameters or {}).get("rope_theta", 10000.0),
        "rope_scaling": _rope_scaling(config),
    }


def _rope_scaling(config: PreTrainedConfig) -> dict[str, Any] | None:
    """`rope_scaling` of transformers 4, which knows a factor by its being a float."""
    rope = {name: value for name, value in (config.rope_parameters or {}).items() if name != "rope_theta"}
    kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", kind)
    if isinstance(rope.get("factor"), int):
        rope["factor"] = float(rope["factor"])
    return None if kind == "default" else {"type": kind, **rope}


def _internlm2_rope_scaling(config: PreTrainedConfig, part: str) -> dict[str, Any] | None:
    """As `_rope_scaling`. Raises ValueError for what the released blocks and InternLM2 cannot do."""
    scaling = _rope_scaling(config)
    if scaling is None:
        return None
    factor = scaling.get("factor")
    known = scaling["type"] in _INTERNLM2_ROPE and isinstance(factor, float) and factor >= 1
    if not known or len(scaling) != 2:
        raise ValueError(
            f"{part}.rope_parameters is {config.rope_parameters!r}, and of scaled RoPE the released code knows only "
            f"rope_type {' and '.join(map(repr, _INTERNLM2_ROPE))} with a factor of 1 or more and nothing else: keep "
            "this checkpoint in hovle's own format"
        )
    return scaling


def _tiling(image_processor: "HovleImageProcessor") -> dict[str, Any]:
    return {
        "dynamic_image_size": image_processor.max_tiles > 1,
        "min_dynamic_patch": image_processor.min_tiles,
        "max_dynamic_patch": image_processor.max_tiles,
        "use_thumbnail": image_processor.use_thumbnail,
    }


def image_processor_from_released(released: Mapping[str, Any], **kwargs: Any) -> "HovleImageProcessor":
    """The tiling that a released `config.json` asks for. `kwargs` go to `HovleImageProcessor`."""
    from hovle_core.image_processor import HovleImageProcessor

    dynamic = released.get("dynamic_image_size", True)
    return HovleImageProcessor(
        tile_size=released["embedding_config"]["image_size"],
        min_tiles=released.get("min_dynamic_patch", 1) if dynamic else 1,
        max_tiles=released.get("max_dynamic_patch", 12) if dynamic else 1,
        use_thumbnail=released.get("use_thumbnail", True),
        **kwargs,
    )

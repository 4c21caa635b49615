"""Released checkpoints (`config.json` with `embedding_config`) read as ours, tensor for tensor, without remote code.

The released LLM is an InternLM2, which is a Llama whose q, k and v are stored as one grouped matrix; the embedding
blocks are always of that kind. Names and layout: hovle-spec, section 1.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from hovle_core.config import HolisticEmbeddingConfig, HovleConfig

RELEASED_MODEL_TYPE = "internvl_chat"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"

# Released name -> ours, as regular expressions on whole names; `wqkv` is split apart below.
_BLOCK = {
    r"attention\.wo": "self_attn.o_proj",
    r"attention\.wqkv": "self_attn.wqkv",
    r"feed_forward\.w1": "mlp.gate_proj",
    r"feed_forward\.w3": "mlp.up_proj",
    r"feed_forward\.w2": "mlp.down_proj",
    r"attention_norm": "input_layernorm",
    r"ffn_norm": "post_attention_layernorm",
}
_EMBEDDING = {
    r"embedding_model\.vision_embeddings\.": "embedding.patch_embed.",
    r"embedding_model\.pixel_shuffle_proj\.": "embedding.pixel_shuffle_proj.",
    r"embedding_model\.llm_text_embeddings\.": "embedding.embed_tokens.",
    r"embedding_model\.encoder\.": "embedding.layers.",
}
_INTERNLM2 = {
    r"language_model\.model\.tok_embeddings\.": "language_model.model.embed_tokens.",
    r"language_model\.output\.": "language_model.lm_head.",
}


def is_released(path: str | Path) -> bool:
    """Whether `path` is a local folder in the released format."""
    config = Path(path) / "config.json"
    return (
        config.is_file()
        and "embedding_config" in (raw := json.loads(config.read_text()))
        and (raw.get("model_type") == RELEASED_MODEL_TYPE)
    )


def convert_config(released: Mapping[str, Any]) -> HovleConfig:
    """A released `config.json` as a HovleConfig. Raises ValueError for an LLM that is not known."""
    embedding, llm = dict(released["embedding_config"]), dict(released["llm_config"])
    names = set(HolisticEmbeddingConfig.__dataclass_fields__) | {"rope_theta", "rope_scaling"}
    kept = {name: value for name, value in embedding.items() if name in names and value is not None}
    for ours in ("architectures", "model_type", "tie_word_embeddings", "dtype"):
        kept.pop(ours, None)
    embedding_config = HolisticEmbeddingConfig(vocab_size=embedding["llm_vocab_size"], **kept)
    return HovleConfig(
        embedding_config=embedding_config,
        text_config=convert_llm_config(llm),
        image_token_id=embedding["img_context_token_id"],
    )


def convert_llm_config(llm: Mapping[str, Any]) -> PreTrainedConfig:
    """`llm_config` as a transformers config; an InternLM2 becomes the Llama that it is."""
    llm = {
        name: value
        for name, value in llm.items()
        if name not in ("attn_implementation", "auto_map", "architectures")
    }
    kind = llm.pop("model_type", None)
    if kind == "internlm2":
        bias = llm.pop("bias", False)
        return LlamaConfig(**llm, attention_bias=bias, architectures=["LlamaForCausalLM"])
    if kind in ("llama", "qwen2"):
        return AutoConfig.for_model(kind, **llm)
    raise ValueError(
        f"llm_config.model_type {kind!r} is not known; known are 'internlm2', 'llama' and 'qwen2'"
    )


def split_wqkv(wqkv: Tensor, num_key_value_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """InternLM2's grouped `wqkv` -> q, k, v. Rows are `[kv_heads, heads / kv_heads + 2, head_dim]`: each group holds
    its queries, then its key, then its value."""
    grouped = wqkv.view(num_key_value_heads, -1, head_dim, *wqkv.shape[1:])
    q, k, v = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
    shape = (-1, *wqkv.shape[1:])
    return q.reshape(shape).contiguous(), k.reshape(shape).contiguous(), v.reshape(shape).contiguous()


def convert_state_dict(released: Mapping[str, Tensor], config: HovleConfig) -> dict[str, Tensor]:
    """Released tensors under our names."""
    internlm2 = any(name.startswith("language_model.model.tok_embeddings") for name in released)
    ours: dict[str, Tensor] = {}
    for released_name, tensor in released.items():
        name = _rename(released_name, internlm2)
        if ".wqkv." not in name:
            ours[name] = tensor
            continue
        part = config.embedding_config if name.startswith("embedding.") else config.text_config
        head_dim = getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads
        for letter, x in zip("qkv", split_wqkv(tensor, part.num_key_value_heads, head_dim), strict=True):
            ours[name.replace(".wqkv.", f".{letter}_proj.")] = x
    return ours


def _rename(name: str, internlm2: bool) -> str:
    rules = dict(_EMBEDDING)
    if name.startswith("embedding_model.encoder.") or internlm2:
        rules |= _BLOCK
    if internlm2:
        rules |= _INTERNLM2
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


def load_released(path: Path, config: HovleConfig | None = None) -> tuple[HovleConfig, dict[str, Tensor]]:
    """Config and tensors of a released checkpoint folder, converted.

    Raises ValueError naming a missing, extra or misshapen tensor, FileNotFoundError where there are no safetensors.
    """
    config = config or convert_config(json.loads((path / "config.json").read_text()))
    ours = convert_state_dict(read_safetensors(path), config)
    check_state_dict(ours, config)
    return config, ours


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder with `model.safetensors`, or with shards and their index."""
    if (index := path / SAFETENSORS_INDEX).is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif (path / SAFETENSORS).is_file():
        files = [SAFETENSORS]
    else:
        raise FileNotFoundError(
            f"{path} has neither {SAFETENSORS} nor {SAFETENSORS_INDEX}; pickled weights are refused, save safetensors"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(path / file, framework="pt") as shard:
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118 (no mapping)
    return tensors


def check_state_dict(tensors: Mapping[str, Tensor], config: HovleConfig) -> None:
    """Raise ValueError naming the tensors that a model of `config` lacks, does not know, or has in another shape."""
    import torch

    from hovle_core.modeling import HovleForConditionalGeneration

    with torch.device("meta"):
        expected = HovleForConditionalGeneration(config).state_dict()
    if config.text_config.tie_word_embeddings:
        expected.pop("language_model.lm_head.weight", None)
        tensors = {
            name: tensor for name, tensor in tensors.items() if name != "language_model.lm_head.weight"
        }
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unknown {name}" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    if problems:
        raise ValueError(f"the released checkpoint does not fit its config: {'; '.join(problems[:8])}")

"""Which released tensor is which of ours, and what shapes both must have. Layout: hovle-spec, section 1."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedConfig

from hovle_core.config import HovleConfig
from hovle_core.official import INTERNLM2, llm_kind
from hovle_core.tensor_files import TensorFiles

Shape = tuple[int, ...]

# Our name -> the released one, in parts: the blocks of an InternLM2 (the embedding's always are), then what is around.
_BLOCK = {
    r"\.self_attn\.[qkv]_proj\.": ".attention.wqkv.",
    r"\.self_attn\.o_proj\.": ".attention.wo.",
    r"\.mlp\.gate_proj\.": ".feed_forward.w1.",
    r"\.mlp\.up_proj\.": ".feed_forward.w3.",
    r"\.mlp\.down_proj\.": ".feed_forward.w2.",
    r"\.input_layernorm\.": ".attention_norm.",
    r"\.post_attention_layernorm\.": ".ffn_norm.",
}
_EMBEDDING = {
    **_BLOCK,
    r"^embedding\.patch_embed\.": "embedding_model.vision_embeddings.",
    r"^embedding\.embed_tokens\.": "embedding_model.llm_text_embeddings.",
    r"^embedding\.layers\.": "embedding_model.encoder.",
    r"^embedding\.": "embedding_model.",
}
_INTERNLM2 = {
    **_BLOCK,
    r"^language_model\.model\.embed_tokens\.": "language_model.model.tok_embeddings.",
    r"^language_model\.lm_head\.": "language_model.output.",
}


@dataclass(frozen=True)
class Entry:
    """One released tensor and what it is of ours: one tensor under another name, or the q, k and v of a `wqkv`.

    The rows of a `wqkv` are `[kv_heads, heads / kv_heads + 2, head_dim]`: each group holds its queries, then its key,
    then its value. `optional`: a tied head, which files may hold a second time or not.
    """

    released: str
    ours: tuple[str, ...]
    shapes: tuple[Shape, ...]
    num_key_value_heads: int
    head_dim: int
    optional: bool = False

    @property
    def released_shape(self) -> Shape:
        return (
            (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:]) if self.is_wqkv else self.shapes[0]
        )

    @property
    def is_wqkv(self) -> bool:
        return len(self.ours) == 3

    def split(self, released: Tensor) -> dict[str, Tensor]:
        """The released tensor as ours. What is only renamed is not copied."""
        if not self.is_wqkv:
            return {self.ours[0]: released}
        rest = released.shape[1:]
        groups = released.view(self.num_key_value_heads, -1, self.head_dim, *rest)
        parts = groups[:, :-2], groups[:, -2], groups[:, -1]
        return {
            name: part.reshape(-1, *rest).contiguous() for name, part in zip(self.ours, parts, strict=True)
        }

    def join(self, ours: Sequence[Tensor]) -> dict[str, Tensor]:
        """Our tensors, in the order of `self.ours`, as the released one. Raises ValueError for unlike dtypes."""
        if not self.is_wqkv:
            return {self.released: ours[0]}
        if len(dtypes := {tensor.dtype for tensor in ours}) > 1:
            raise ValueError(
                f"{', '.join(self.ours)} must have one dtype to be joined, got {sorted(map(str, dtypes))}"
            )
        rest = ours[0].shape[1:]
        groups = [tensor.view(self.num_key_value_heads, -1, self.head_dim, *rest) for tensor in ours]
        return {self.released: torch.cat(groups, dim=1).reshape(-1, *rest)}


def layout(config: HovleConfig) -> list[Entry]:
    """Every tensor of a HoVLE of `config`, under both names. Raises ValueError as `llm_kind`."""
    from hovle_core.modeling import HovleForConditionalGeneration

    with torch.device("meta"):
        expected = HovleForConditionalGeneration(config).state_dict()
    llm_names = _INTERNLM2 if llm_kind(config) == INTERNLM2 else {}
    groups: dict[str, list[str]] = {}
    for name in expected:
        rules = _EMBEDDING if name.startswith("embedding.") else llm_names
        groups.setdefault(_renamed(name, rules), []).append(name)
    entries = []
    for released, ours in groups.items():
        part = config.embedding_config if ours[0].startswith("embedding.") else config.text_config
        is_tied = ours == ["language_model.lm_head.weight"] and config.text_config.tie_word_embeddings
        entries.append(_entry(released, ours, expected, part, is_tied))
    return entries


def llm_layout(config: PreTrainedConfig) -> list[Entry]:
    """As `layout`, of a bare InternLM2 of this (Llama's) config, without a HoVLE around it."""
    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    groups: dict[str, list[str]] = {}
    for name in expected:
        released = _renamed(f"language_model.{name}", _INTERNLM2).removeprefix("language_model.")
        groups.setdefault(released, []).append(name)
    return [
        _entry(released, ours, expected, config, ours == ["lm_head.weight"] and config.tie_word_embeddings)
        for released, ours in groups.items()
    ]


def _entry(
    released: str, ours: list[str], expected: Mapping[str, Tensor], part: PreTrainedConfig, is_tied: bool
) -> Entry:
    ours.sort(key=lambda name: (".q_proj." not in name, ".k_proj." not in name))  # q, then k, then v
    return Entry(
        released,
        tuple(ours),
        tuple(tuple(expected[name].shape) for name in ours),
        part.num_key_value_heads,
        getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads,
        optional=is_tied,
    )


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


def check_released(entries: Sequence[Entry], found: Mapping[str, Shape], where: object) -> None:
    """Raise ValueError naming released tensors that are missing, unknown, or of another shape than `entries` say."""
    expected = {entry.released: entry.released_shape for entry in entries}
    _check(expected, found, {entry.released for entry in entries if entry.optional}, where)


def check_ours(entries: Sequence[Entry], found: Mapping[str, Shape], where: object) -> None:
    """As `check_released`, for tensors under our names."""
    expected = {name: shape for e in entries for name, shape in zip(e.ours, e.shapes, strict=True)}
    _check(expected, found, {name for entry in entries if entry.optional for name in entry.ours}, where)


def _check(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], optional: set[str], where: object
) -> None:
    problems = [
        f"missing {name}, expected {list(expected[name])}"
        for name in sorted(expected.keys() - found.keys() - optional)
    ]
    problems += [f"unknown {name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != expected[name]
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"the tensors of {where} do not fit its config: {'; '.join(problems[:8])}{more}")


def load_released(folder: Path, config: HovleConfig) -> dict[str, Tensor]:
    """The tensors of a released folder of this config under our names; what is not a q, k or v stays mapped from disk.

    Raises ValueError naming a missing, unknown or misshapen tensor, FileNotFoundError where there are no safetensors.
    """
    entries = layout(config)
    with TensorFiles(folder) as tensors:
        check_released(entries, tensors.shapes, folder)
        ours: dict[str, Tensor] = {}
        for entry in entries:
            if not entry.optional:  # a tied head follows the table it is tied to
                ours |= entry.split(tensors[entry.released])
    return ours

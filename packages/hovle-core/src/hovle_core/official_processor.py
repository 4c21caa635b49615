"""The processor of a released checkpoint: its tiling, its tokenizer read without remote code, its chat template."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from hovle_core.config import IMAGENET_MEAN, IMAGENET_STD
from hovle_core.official import image_processor_from_released, json_object, read_released_config
from hovle_core.processor import IMAGE_CONTEXT, HovleProcessor
from hovle_core.sentencepiece_tokenizer import sentencepiece_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")

# The released code writes prompts itself, by `template` of its config: text and end tokens as in its conversation.py.
_SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_CHATML = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}<|im_start|>system\n"
    + _SYSTEM
    + "<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CHAT_TEMPLATES = {"internlm2-chat": _CHATML, "Hermes-2": _CHATML}
CHATML_END = "<|im_end|>"


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)


def processor_from_released(folder: Path) -> HovleProcessor:
    """The processor of a released folder.

    Raises FileNotFoundError where there is no tokenizer; ValueError for one that does not fit the config, or that needs
    a package which is not installed.
    """
    released = json_object(folder / "config.json")
    config = read_released_config(folder)
    try:
        tokenizer = load_tokenizer(folder, released["llm_config"]["model_type"])
    except (
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # transformers', of files that are no tokenizer's
        raise ValueError(
            f"the tokenizer of {folder} cannot be read: {type(error).__name__}: {error}"
        ) from error
    if (found := tokenizer.get_vocab().get(IMAGE_CONTEXT)) != config.image_token_id:
        raise ValueError(
            f"the tokenizer of {folder} has {IMAGE_CONTEXT} at {found}, its config.json at "
            f"embedding_config.img_context_token_id {config.image_token_id}: they are of different models"
        )
    if tokenizer.chat_template is None:
        template = released.get("template")
        if template not in _CHAT_TEMPLATES:
            raise ValueError(
                f"{folder}/config.json: template {template!r} is not known (known: {sorted(_CHAT_TEMPLATES)}); add a "
                "chat_template.jinja to the folder"
            )
        tokenizer.chat_template = _CHAT_TEMPLATES[template]
        tokenizer.eos_token = CHATML_END  # what ends an answer there
    return HovleProcessor(
        image_processor_from_released(released, **_normalisation(folder)),
        tokenizer,
        tokens_per_tile=config.embedding_config.tokens_per_tile,
    )


def load_tokenizer(folder: Path, llm_kind: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a released folder; no class of its own is run.

    Raises FileNotFoundError where there is none, ValueError as `sentencepiece_tokenizer`.
    """
    if not has_tokenizer(folder):
        raise FileNotFoundError(
            f"{folder} holds no tokenizer ({', '.join(_VOCABULARIES)}): copy its files there, or build a "
            "HovleProcessor with a tokenizer of your own"
        )
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if llm_kind == "qwen2":
        return Qwen2Tokenizer.from_pretrained(folder)
    return sentencepiece_tokenizer(folder)


def _normalisation(folder: Path) -> dict[str, Any]:
    """Mean and standard deviation from `preprocessor_config.json`; ImageNet's, as the released code has, without it."""
    path = folder / "preprocessor_config.json"
    given = json_object(path) if path.is_file() else {}
    return {
        "image_mean": given.get("image_mean", IMAGENET_MEAN),
        "image_std": given.get("image_std", IMAGENET_STD),
    }

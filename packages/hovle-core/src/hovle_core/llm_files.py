"""LLMs in files that `AutoModelForCausalLM` does not read as they are: GGUF, and InternLM2. No remote code."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hovle_core.config import RELEASED_LLM
from hovle_core.official import INTERNLM2, json_object, llm_config_from_released
from hovle_core.official_processor import CHATML_END, load_tokenizer
from hovle_core.official_tensors import check_released, llm_layout
from hovle_core.tensor_files import TensorFiles

GGUF = ".gguf"
# What is known of them without a download.
_LARGER = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip
PUBLISHED_INTERNLM2 = {
    "internlm/internlm2-chat-1_8b": {**RELEASED_LLM, "vocab_size": 92544},
    "internlm/internlm2-chat-7b": {**RELEASED_LLM, "vocab_size": 92544, **_LARGER},
}


def internlm2_config(folder: Path) -> PreTrainedConfig:
    """An InternLM2's config as the Llama's that it is."""
    return llm_config_from_released(json_object(folder / "config.json"))


def internlm2_model(folder: Path) -> PreTrainedModel:
    """An InternLM2 in float32 as a Llama. Raises ValueError naming a missing, unknown or misshapen tensor."""
    config = internlm2_config(folder)
    entries = llm_layout(config)
    state: dict[str, torch.Tensor] = {}
    with TensorFiles(folder) as tensors:
        check_released(entries, tensors.shapes, folder)
        for entry in entries:
            if not entry.optional:
                state |= entry.split(tensors[entry.released])
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def internlm2_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Its tokenizer, from tokenizer.json or tokenizer.model; an answer ends where the chat template ends a turn."""
    tokenizer = load_tokenizer(folder, INTERNLM2)
    if CHATML_END in (tokenizer.chat_template or "") and CHATML_END in tokenizer.get_vocab():
        tokenizer.eos_token = CHATML_END
    return tokenizer


def gguf_config(file: Path) -> PreTrainedConfig:
    """The config inside of a GGUF file."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.dtype = torch.float32
    return config


def gguf_model(file: Path) -> PreTrainedModel:
    """A GGUF file's model, dequantised to float32; it trains and saves like any other.

    Raises ValueError where the `gguf` package is not installed.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except ImportError as error:
        raise ValueError(f"{file} needs gguf and accelerate: pip install 'hovle-core[gguf]'") from error
    # transformers dequantises the weights but still calls the model quantised, and would then refuse to save it.
    del model.hf_quantizer
    del model.config.quantization_config
    model.is_quantized = False
    return model


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer inside of a GGUF file."""
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)

"""A small byte-level BPE tokenizer, trained on the demo's own training text."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hovle_data.schema import Sample

VOCAB_SIZE = 2000
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PICTURE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, *PICTURE_TOKENS)

# ChatML without a default system prompt. Parts of a message that are pictures stand where they are as one <img></img>
# pair; whoever encodes pictures fills it.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<img></img>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """The same texts give the same tokenizer. Any text can be encoded: all 256 bytes are in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Sorted: the trainer's result must not hang on the order in which samples happen to come.
    tokenizer.train_from_iterator(sorted(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(PICTURE_TOKENS),
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(samples: Iterable[Sample], out: Path) -> int:
    """Trains on all text of `samples` and writes a transformers tokenizer folder; returns the vocabulary's size."""
    tokenizer = train_tokenizer(text for sample in samples for text in sample_texts(sample))
    tokenizer.save_pretrained(out)
    return len(tokenizer)


def sample_texts(sample: Sample) -> list[str]:
    """A sample's text, or the texts of its messages."""
    if sample.text is not None:
        return [sample.text]
    texts = []
    for message in sample.messages or ():
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if part["type"] == "text"]
    return texts

"""tiktoken vocabularies: the same ids as the byte-level BPE that the ranks were taken from."""

import base64

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hovle_core.backbones import TiktokenTokenizer
from hovle_core.testing import CHATML
from hovle_core.testing.conformance import TokenizerTests
from hovle_core.tiktoken_file import PATTERNS

TEXTS = ["what is this? a red square", "don't 12345 cats\n\n  indented", "Größe 大きさ 🦉", "  two  spaces "]
ENDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def original():
    """A BPE trained by `tokenizers` with cl100k's pattern."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERNS["cl100k_base"]), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 9, trainer)
    return backend


@pytest.fixture(scope="module")
def arguments(original, tmp_path_factory):
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    file = tmp_path_factory.mktemp("tiktoken") / "tiny.tiktoken"
    lines = [
        base64.b64encode(bytes(byte_of[letter] for letter in piece)) + b" %d\n" % rank
        for piece, rank in sorted(original.get_vocab().items(), key=lambda item: item[1])
    ]
    file.write_bytes(b"".join(lines))
    size = original.get_vocab_size()
    special = {token: size + i for i, token in enumerate(ENDS)}
    return {"path": str(file), "special_tokens": special, "eos_token": "<|im_end|>", "chat_template": CHATML}


class TestTiktoken(TokenizerTests):
    name = "tiktoken"

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls, arguments):
        return arguments


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_vocabulary(original, arguments, text):
    tokenizer = TiktokenTokenizer(**arguments).tokenizer()
    assert tokenizer(text)["input_ids"] == original.encode(text).ids
    assert tokenizer.convert_tokens_to_ids(ENDS) == list(arguments["special_tokens"].values())


def test_what_is_wrong_is_named(arguments, tmp_path):
    with pytest.raises(ValueError, match="must be a .tiktoken file"):
        TiktokenTokenizer(**{**arguments, "path": str(tmp_path)})
    with pytest.raises(ValueError, match="must have the ids from .* on"):
        TiktokenTokenizer(**{**arguments, "special_tokens": {"<|im_end|>": 9}}).tokenizer()
    with pytest.raises(ValueError, match="eos_token 'x' must be one of"):
        TiktokenTokenizer(**{**arguments, "eos_token": "x"}).tokenizer()
    bad = tmp_path / "bad.tiktoken"
    bad.write_text("YQ== 0\nnonsense\n")
    with pytest.raises(ValueError, match="line 2: b'nonsense' is no base64 piece and rank"):
        TiktokenTokenizer(**{**arguments, "path": str(bad)}).tokenizer()

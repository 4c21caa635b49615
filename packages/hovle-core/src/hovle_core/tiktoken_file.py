"""A tiktoken vocabulary (`*.tiktoken`: a base64 piece and its rank on each line) as a transformers tokenizer.

The ranks of a byte-level BPE are its merges: a piece is made of the two pieces that were known before it. Neither the
`tiktoken` package nor the network is needed. The file does not hold the pattern that cuts text into words first.
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_base import generate_merges

#: The patterns of OpenAI's published encodings (tiktoken_ext/openai_public.py).
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k_base": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen's: digits one by one.
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
}


def tiktoken_tokenizer(
    file: Path, pattern: str, special_tokens: Mapping[str, int], eos_token: str
) -> PreTrainedTokenizerBase:
    """The tokenizer of a `.tiktoken` file.

    Args:
        pattern: a name of `PATTERNS`, or a regular expression.
        special_tokens: token -> id, as the encoding has them; ids follow those of the file without a gap.
        eos_token: one of `special_tokens`.

    Raises ValueError for a line that is no piece and rank, and for special tokens that do not follow the pieces.
    """
    vocab = read_ranks(file)
    if eos_token not in special_tokens:
        raise ValueError(f"eos_token {eos_token!r} must be one of special_tokens {sorted(special_tokens)}")
    ordered = sorted(special_tokens, key=lambda token: special_tokens[token])
    if [special_tokens[token] for token in ordered] != list(range(len(vocab), len(vocab) + len(ordered))):
        raise ValueError(
            f"special_tokens must have the ids from {len(vocab)} on, which follow those of {file}, got "
            f"{dict(special_tokens)}: name those in the gaps, too"
        )
    backend = Tokenizer(models.BPE(vocab=vocab, merges=generate_merges(vocab), ignore_merges=True))
    words = pre_tokenizers.Split(Regex(PATTERNS.get(pattern, pattern)), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(ordered)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos_token, extra_special_tokens=ordered, padding_side="left"
    )


def read_ranks(file: Path) -> dict[str, int]:
    """Piece, each byte as the letter that byte-level BPEs write for it -> rank."""
    letters = bytes_to_unicode()
    vocab: dict[str, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            vocab["".join(letters[byte] for byte in base64.b64decode(piece, validate=True))] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{file}, line {number}: {line[:40]!r} is no base64 piece and rank: {error}"
            ) from None
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{file}: ranks must be 0..{len(vocab) - 1}, each once")
    return vocab

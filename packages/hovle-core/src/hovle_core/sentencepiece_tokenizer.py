"""An InternLM2's `tokenizer.model` as a transformers tokenizer; its own class is remote code.

It is a byte-fallback BPE like Llama's, with one turn of its own: tokens added later take the place of unused pieces
(`<|im_end|>` is 92542, inside the model's 92544), so pieces are renamed before the tokenizer is built.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import SentencePieceExtractor
from transformers.tokenization_utils_base import generate_merges
from transformers.utils import is_sentencepiece_available

_NORMAL, _USER_DEFINED = 1, 4  # sentencepiece_model.proto, SentencePiece.Type
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def sentencepiece_tokenizer(folder: Path) -> LlamaTokenizer:
    """The tokenizer of `folder`, from `tokenizer.model` and `tokenizer_config.json`.

    Raises ValueError where sentencepiece is not installed, or for a model that Llama's tokenizer cannot follow.
    """
    path = folder / "tokenizer.model"
    if not is_sentencepiece_available():
        raise ValueError(f"{path} needs sentencepiece: pip install 'hovle-core[sentencepiece]'")
    proto = SentencePieceExtractor(str(path)).proto
    normalizer = proto.normalizer_spec
    if (
        proto.trainer_spec.model_type != 2
        or normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
    ):
        raise ValueError(f"{path} is not a BPE that leaves text as it is, as InternLM2's and Llama's are")
    added = _added_tokens(folder)
    pieces = [added.get(i, piece.piece) for i, piece in enumerate(proto.pieces)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # Text never becomes a control, byte or renamed piece by merging characters.
    unmerged = {piece for i, piece in enumerate(pieces) if i in added or proto.pieces[i].type != _NORMAL}
    config = _read(folder / "tokenizer_config.json")
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=generate_merges(vocab, skip_tokens=unmerged),
        add_prefix_space=normalizer.add_dummy_prefix,
        legacy=False,
        chat_template=config.get("chat_template"),
        **{name: _content(config[name]) for name in _NAMED if config.get(name)},
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece, normalized=False)
            for i, piece in enumerate(pieces)
            if i not in added and proto.pieces[i].type == _USER_DEFINED
        ]
    )
    special = [added[i] for i in sorted(added)]
    tokenizer.add_special_tokens({"additional_special_tokens": special}, replace_extra_special_tokens=False)
    for i, token in added.items():
        if (found := tokenizer.convert_tokens_to_ids(token)) != i:
            raise ValueError(
                f"{folder}: token {token!r} must be {i} and would be {found}; ids may not have gaps"
            )
    return tokenizer


def _added_tokens(folder: Path) -> dict[int, str]:
    """Id -> token, of `tokenizer_config.json` and of the older `added_tokens.json`."""
    older = {i: token for token, i in _read(folder / "added_tokens.json").items()}
    newer = _read(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    return older | {int(i): token["content"] for i, token in newer.items()}


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}

"""Conformance of tokenizers: those of `hovle_core.roles.TokenizerProvider`, and those of backbones."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hovle_core.processor import IMAGE_TOKENS
from hovle_core.rendering import text_ids
from hovle_core.roles import TokenizerProvider
from hovle_core.testing.conformance.base import SpecTests


class TokenizerChecks:
    """What training and chat need of a tokenizer; the class around it has a fixture `tokenizer`."""

    texts: ClassVar[tuple[str, ...]] = (
        "a red square",
        "two  spaces and\na line break",
        "Größe, 大きさ, 🦉",
        "def f(x):\n    return x  # code",
    )

    def test_text_comes_back(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """What is lost in encoding can be neither learnt nor written."""
        for text in self.texts:
            back = tokenizer.decode(text_ids(tokenizer, text), clean_up_tokenization_spaces=False)
            assert back.removeprefix(" ") == text, f"{text!r} comes back as {back!r}"

    def test_offsets_point_into_the_text(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Labels and highlights are placed by offsets; wrong ones shift them without a word."""
        if not tokenizer.is_fast:  # slow tokenizers have none, which transformers itself says
            return
        for text in self.texts:
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            end = 0
            for id_, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
                assert 0 <= start <= stop <= len(text), f"offset {start}..{stop} is outside of {text!r}"
                assert start <= end, f"{text[end:start]!r} of {text!r} belongs to no token"
                piece = tokenizer.decode([id_])
                assert "\ufffd" in piece or text[start:stop].strip() == piece.strip(), (
                    f"token {piece!r} claims to be {text[start:stop]!r} of {text!r}"
                )
                end = max(end, stop)
            assert not text[end:].strip(), f"{text[end:]!r} of {text!r} belongs to no token"

    def test_picture_tokens_are_single_ids(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Pictures are laid out by these three ids: a token in pieces, or two with one id, has no place for them."""
        missing = [token for token in IMAGE_TOKENS if token not in tokenizer.get_vocab()]
        assert not missing, f"it lacks {missing}: call hovle_core.processor.add_image_tokens(tokenizer)"
        ids = [tokenizer.encode(token, add_special_tokens=False) for token in IMAGE_TOKENS]
        assert all(len(one) == 1 for one in ids), f"picture tokens take several ids: {ids}"
        assert len({one[0] for one in ids}) == len(IMAGE_TOKENS), f"picture tokens share an id: {ids}"

    def test_typed_special_tokens_stay_text(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """A user who types `<IMG_CONTEXT>` or an end token must not make a picture or end a turn."""
        special = {*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS))}
        for token in (*IMAGE_TOKENS, *tokenizer.all_special_tokens):
            found = special.intersection(text_ids(tokenizer, f"look: {token} there"))
            assert not found, (
                f"typed {token!r} becomes special ids {sorted(found)}: declare it as a special token"
            )

    def test_has_an_end_token(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Answers end with it; without one, generation never stops."""
        assert tokenizer.eos_token_id is not None, "eos_token is not set"
        assert tokenizer.eos_token_id < len(tokenizer), "eos_token_id is outside of the vocabulary"

    def test_survives_saving_and_loading(self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        """Checkpoints hold it as files: what comes back must give the same ids."""
        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert len(again) == len(tokenizer), f"{len(tokenizer)} tokens were saved, {len(again)} came back"
        for text in (*self.texts, *IMAGE_TOKENS):
            before, after = (t(text, add_special_tokens=False)["input_ids"] for t in (tokenizer, again))
            assert after == before, f"{text!r} was {before} and is {after} after loading"
        assert again.chat_template == tokenizer.chat_template, "the chat template was lost"
        assert again.all_special_ids == tokenizer.all_special_ids, "special tokens were lost"


class TokenizerTests(TokenizerChecks, SpecTests):
    """A provider of a tokenizer that is not the backbone's own."""

    kind = "tokenizer"

    @pytest.fixture(scope="class")
    @classmethod
    def tokenizer(cls, subject: TokenizerProvider) -> PreTrainedTokenizerBase:
        return subject.tokenizer()

    def test_is_a_tokenizer_provider(self, subject: Any) -> None:
        """It is made to read a recipe, and loads only when the tokenizer is asked for."""
        assert isinstance(subject, TokenizerProvider), (
            f"the target returns a {type(subject).__name__}: make it a subclass of hovle_core.roles.TokenizerProvider"
        )

    def test_gives_the_same_tokenizer_each_time(self, subject: TokenizerProvider) -> None:
        """Every worker of a run asks for it by itself."""
        first, second = subject.tokenizer(), subject.tokenizer()
        assert first.get_vocab() == second.get_vocab(), "two calls gave two vocabularies"

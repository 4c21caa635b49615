"""Tokenizers that differ from the LLM's: noticed, and followed by the embeddings only where that is asked for."""

import copy

import pytest
import torch

from hovle_core.testing import tiny_llm, tiny_tokenizer
from hovle_core.vocabulary import conflicts, fit_embeddings


@pytest.fixture(scope="module")
def other():
    return tiny_tokenizer(["square thing number here"] * 9)


def test_the_same_tokens_do_not_conflict() -> None:
    own, more = tiny_tokenizer(), tiny_tokenizer()
    more.add_tokens(["<new>"])
    assert conflicts(own, own) == conflicts(more, own) == conflicts(own, more) == []


def test_the_same_ids_for_other_tokens_conflict(other) -> None:
    own = tiny_tokenizer()
    found = conflicts(other, own)
    assert found
    assert all(own.convert_ids_to_tokens(other.convert_tokens_to_ids(token)) != token for token in found)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_follow_their_tokens(tied: bool, other) -> None:
    own = tiny_tokenizer()
    llm = tiny_llm(len(own) + 5, tie_word_embeddings=tied)  # rows beyond the tokenizer's are no token
    before = copy.deepcopy(llm)
    fit_embeddings(llm, own, other)
    shared = sorted(own.get_vocab().keys() & other.get_vocab().keys())
    new = sorted(other.get_vocab().keys() - own.get_vocab().keys())
    assert shared
    assert new
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old_rows, rows = (getattr(model, get)().weight for model in (before, llm))
        assert rows.shape == (len(other), 32)
        ids = own.convert_tokens_to_ids(shared), other.convert_tokens_to_ids(shared)
        assert torch.equal(rows[ids[1]], old_rows[ids[0]])
        mean = old_rows[: len(own)].mean(0)
        assert all(torch.equal(rows[i], mean) for i in other.convert_tokens_to_ids(new))
    assert (llm.get_output_embeddings().weight is llm.get_input_embeddings().weight) == tied
    assert llm.config.vocab_size == len(other)
    assert llm.config.eos_token_id == llm.generation_config.eos_token_id == other.eos_token_id

    # Text of shared tokens alone means to the LLM what it meant.
    with torch.no_grad():
        was = before(torch.tensor([own.convert_tokens_to_ids(shared[:8])])).logits
        now = llm(torch.tensor([other.convert_tokens_to_ids(shared[:8])])).logits
    torch.testing.assert_close(
        now[..., other.convert_tokens_to_ids(shared)], was[..., own.convert_tokens_to_ids(shared)]
    )

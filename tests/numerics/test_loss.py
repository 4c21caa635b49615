"""The loss that every stage uses against transformers' own on all logits."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hovle_core import HovleForConditionalGeneration, losses
from hovle_core.losses import PLAIN_HEADS, causal_lm_loss, next_token_loss
from hovle_core.testing import tiny_embedding_config, tiny_llm

VOCAB = 120


def batch(rows=1):
    ids = torch.randint(3, VOCAB, (rows, 24))
    return ids, torch.where(torch.rand(ids.shape) < 0.25, ids, -100)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def small_hovle(tied):
    """A HoVLE whose head, tied or not, has weights to tell apart."""
    llm = tiny_llm(VOCAB, tie_word_embeddings=tied)
    return HovleForConditionalGeneration.from_language_model(llm, tiny_embedding_config(VOCAB), 1)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_loss_and_gradients_are_those_of_all_logits(monkeypatch, rows, tied, autocast, chunked):
    if chunked:
        monkeypatch.setattr(losses, "LARGEST_LOGITS", 0)
        monkeypatch.setattr(losses, "CHUNK_LOGITS", 4 * VOCAB * 2)  # two rows a chunk
    model = small_hovle(tied)
    ids, labels = batch(rows)
    tolerance = 1e-2 if autocast else 1e-5  # bfloat16 has 8 bits
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = model.eval()(ids, labels=labels)  # all logits, transformers' loss
        ours = model.train()(ids, labels=labels)
    assert theirs.logits.shape == (rows, 24, VOCAB)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=tolerance, atol=tolerance)
    assert_same(gradients(model, ours.loss), gradients(model, theirs.loss), tolerance)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        summed = next_token_loss(model.eval(), {"input_ids": ids}, labels)
    count = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(summed / count, theirs.loss, rtol=tolerance, atol=tolerance)


def test_the_chunked_loss_is_used_where_it_wins(monkeypatch):
    """For large float32 logits; not on small ones, not in bfloat16 on a CPU, not for a head that is no nn.Linear."""
    calls = []
    chunked = nn.functional.linear_cross_entropy

    def counting(*args, **kwargs):
        calls.append(kwargs["options"].batch_chunk_size)
        return chunked(*args, **kwargs)

    monkeypatch.setattr(losses.F, "linear_cross_entropy", counting)
    hidden, targets, head = torch.randn(9, 8), torch.randint(0, VOCAB, (9,)), nn.Linear(8, VOCAB)
    small = losses.head_loss(head, hidden, targets)
    assert calls == []
    monkeypatch.setattr(losses, "LARGEST_LOGITS", 9 * VOCAB * 4 - 1)
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 4 * VOCAB * 4)
    torch.testing.assert_close(losses.head_loss(head, hidden, targets), small, rtol=1e-5, atol=1e-5)
    assert calls == [4]
    losses.head_loss(nn.Sequential(head), hidden, targets)
    losses.head_loss(head.bfloat16(), hidden.bfloat16(), targets)
    assert calls == [4]


def test_the_head_runs_at_targets_only():
    model = small_hovle(tied=False).train()
    ids, labels = batch(rows=2)
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    model(ids, labels=labels).loss.backward()
    assert shapes == [((labels[:, 1:] != -100).sum(), VOCAB)]


def test_num_items_in_batch_divides_as_in_transformers():
    model = small_hovle(tied=True)
    ids, labels = batch()
    theirs = model.eval()(ids, labels=labels, num_items_in_batch=7).loss
    torch.testing.assert_close(model.train()(ids, labels=labels, num_items_in_batch=7).loss, theirs)


@pytest.mark.parametrize("family", [*sorted(PLAIN_HEADS), "gemma2", "cohere", "granite"])
def test_every_family_gives_its_own_loss(family):
    """Gemma caps its logits, Cohere and Granite scale them: those are called as they are."""
    special = {"gemma2": {"head_dim": 8}, "granite": {"logits_scaling": 4.0}}.get(family, {})
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, pad_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, **special,
    )  # fmt: skip
    llm = AutoModelForCausalLM.from_config(config)
    nn.init.normal_(llm.get_output_embeddings().weight)  # logits large enough for a cap to matter
    ids, labels = batch(rows=2)
    count = (labels[:, 1:] != -100).sum()
    theirs = llm(input_ids=ids, labels=labels, use_cache=False).loss
    ours = causal_lm_loss(llm, labels, input_ids=ids, use_cache=False) / count
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_same(gradients(llm, ours), gradients(llm, theirs), 1e-5)

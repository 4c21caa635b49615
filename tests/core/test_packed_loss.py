"""The loss of packed rows is that of their samples: none predicts the first token of the next, label or not."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from hovle_core.losses import IGNORE_INDEX, next_token_loss, within_samples
from hovle_core.testing import tiny_hovle, tiny_llm, tiny_processor, tiny_tokenizer

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_tokenizer())


@pytest.fixture(scope="module")
def samples(processor):
    """ids and labels `[1, T]`; plain text's first token is a label, too."""
    texts = [processor.encode_text(text) for text in ("what is this", "a red blue square", "is", "circle")]
    assert all(text.labels[0] != IGNORE_INDEX for text in texts)
    return [tuple(torch.from_numpy(x)[None] for x in (text.input_ids, text.labels)) for text in texts]


def gemma(vocab_size):
    """One whose head is not plain: the loss takes its logits as they are."""
    config = AutoConfig.for_model(
        "gemma2", vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


MODELS = {
    "hovle": lambda tokenizer: tiny_hovle(tokenizer),
    "hovle-hd": lambda tokenizer: tiny_hovle(tokenizer, pixel_shuffle_loc="post"),
    "llama": lambda tokenizer: tiny_llm(len(tokenizer)),
    "gemma2": lambda tokenizer: gemma(len(tokenizer)),
}


def loss_and_gradients(model, batches):
    model.zero_grad()
    loss = sum(next_token_loss(model, inputs, labels) for inputs, labels in batches)
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
def test_packed_is_unpacked_where_first_tokens_have_labels(processor, samples, kind):
    model = MODELS[kind](processor.tokenizer).train()
    ids, labels = (torch.cat(rows, dim=1) for rows in zip(*samples, strict=True))
    positions = torch.cat([torch.arange(row.shape[1]) for row, _ in samples])[None]
    packed = loss_and_gradients(model, [({"input_ids": ids, "position_ids": positions}, labels)])
    alone = loss_and_gradients(model, [({"input_ids": row}, own) for row, own in samples])
    torch.testing.assert_close(packed, alone, **TOLERANCE)


@pytest.mark.parametrize("training", [True, False])
def test_the_mean_of_a_packed_row_is_over_its_samples_targets(processor, samples, training):
    model = tiny_hovle(processor.tokenizer).train(training)
    ids, labels = (torch.cat(rows, dim=1) for rows in zip(*samples, strict=True))
    positions = torch.cat([torch.arange(row.shape[1]) for row, _ in samples])[None]
    packed = model(input_ids=ids, position_ids=positions, labels=labels).loss
    counts = [(own[:, 1:] != IGNORE_INDEX).sum() for _, own in samples]
    means = [model(input_ids=row, labels=own).loss for row, own in samples]
    torch.testing.assert_close(
        packed, sum(n * m for n, m in zip(counts, means, strict=True)) / sum(counts), **TOLERANCE
    )


def test_a_padded_batch_keeps_every_label(processor, samples):
    """Its positions stand still at the padding, which begins no sample: the loss is cross entropy on all logits."""
    model = tiny_hovle(processor.tokenizer)
    longest = max(row.shape[1] for row, _ in samples)
    ids, labels, mask = (
        torch.cat([F.pad(x, (longest - x.shape[1], 0), value=fill) for x in rows])
        for rows, fill in (
            ([row for row, _ in samples], 0),
            ([own for _, own in samples], IGNORE_INDEX),
            ([torch.ones_like(row) for row, _ in samples], 0),
        )
    )
    inputs = {"input_ids": ids, "attention_mask": mask}
    logits = model(**inputs).logits[:, :-1].transpose(1, 2)
    expected = F.cross_entropy(logits, labels[:, 1:], reduction="sum")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for given in ({}, {"position_ids": positions}):
        torch.testing.assert_close(next_token_loss(model, inputs | given, labels), expected, **TOLERANCE)


def test_where_samples_begin():
    labels = torch.arange(1, 13).view(2, 6)
    positions = torch.tensor([[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    assert within_samples(labels, positions, None).tolist() == [
        [1, 2, IGNORE_INDEX, IGNORE_INDEX, 5, 6],
        [7, 8, 9, 10, 11, 12],
    ]
    assert (
        within_samples(labels, positions[:1], None)[:, 3].tolist() == [IGNORE_INDEX] * 2
    )  # one for all rows
    for row in (None, torch.arange(6)[None] + 3):
        assert torch.equal(within_samples(labels, row, None), labels)
    assert within_samples(labels, positions, torch.ones(2, 6)) is labels

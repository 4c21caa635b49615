"""The cache that appends in place: transformers' DynamicLayer, number for number, whatever is done to it."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from hovle_core.cache import SMALLEST_GROWTH, GrowingLayer, grow_in_place
from hovle_core.testing import tiny_hovle, tiny_tokenizer


def states(length, batch=2):
    return torch.randn(batch, 3, length, 4), torch.randn(batch, 3, length, 4)


OPERATIONS = {
    "append": lambda layer: None,
    "crop": lambda layer: layer.crop(-2),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "reset": lambda layer: layer.reset(),
    "offload": lambda layer: (layer.offload(), layer.prefetch()),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_it_is_a_dynamic_layer(operation):
    ours, theirs = GrowingLayer(), DynamicLayer()
    for length in (5, 1, SMALLEST_GROWTH + 3, 1, 1):
        batch = 2 if ours.keys is None else ours.keys.shape[0]
        new = states(length, batch)
        for a, b in zip(ours.update(*new), theirs.update(*new), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        if batch == 2:
            OPERATIONS[operation](ours)
            OPERATIONS[operation](theirs)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_a_step_does_not_move_what_is_cached():
    layer = GrowingLayer()
    address = layer.update(*states(10))[0].data_ptr()
    assert {layer.update(*states(1))[0].data_ptr() for _ in range(SMALLEST_GROWTH)} == {address}
    assert layer.update(*states(1))[0].data_ptr() != address


def test_a_copy_goes_its_own_way():
    layer = GrowingLayer()
    layer.update(*states(10))
    other = copy.deepcopy(layer)
    first, second = states(1), states(1)
    layer.update(*first)
    other.update(*second)
    assert torch.equal(layer.keys[:, :, -1:], first[0])
    assert torch.equal(other.keys[:, :, -1:], second[0])


def test_gradients_and_inference_tensors_are_not_written_to():
    layer = GrowingLayer()
    keys, values = (x.requires_grad_() for x in states(3))
    layer.update(keys, values)
    grown, _ = layer.update(*states(2))
    grown.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*states(3))
    with torch.no_grad():
        assert layer.update(*states(1))[0].shape[2] == 4


def test_only_empty_dynamic_layers_are_exchanged():
    cache = DynamicCache()
    filled = DynamicLayer()
    filled.update(*states(2))
    cache.layers = [filled, DynamicLayer(), StaticLayer(8)]
    grow_in_place(cache)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, GrowingLayer, StaticLayer]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_with_and_without_cache(options):
    tokenizer = tiny_tokenizer()
    model = tiny_hovle(tokenizer)
    ids = torch.randint(3, 200, (2, 9))
    options = {**options, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(
        cached, model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    )


def test_generate_appends_in_place():
    model = tiny_hovle(tiny_tokenizer())
    ids = torch.randint(3, 200, (1, 9))
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, return_dict_in_generate=True
    )
    assert {type(layer) for layer in out.past_key_values.layers} == {GrowingLayer}

"""Sizes that no embedding has are refused where its config is made."""

import pytest

from hovle_core.config import HolisticEmbeddingConfig


def test_a_negative_number_of_layers_is_refused():
    with pytest.raises(ValueError, match="num_hidden_layers must not be negative, got -2"):
        HolisticEmbeddingConfig(num_hidden_layers=-2)
    assert HolisticEmbeddingConfig(num_hidden_layers=0).num_hidden_layers == 0  # no blocks: a baseline


def test_a_shuffle_behind_no_blocks_is_refused():
    with pytest.raises(ValueError, match="num_hidden_layers is 0: use 'pre'"):
        HolisticEmbeddingConfig(num_hidden_layers=0, pixel_shuffle_loc="post")


@pytest.mark.parametrize("name", ["num_attention_heads", "num_key_value_heads"])
def test_no_heads_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        HolisticEmbeddingConfig(**{name: 0})

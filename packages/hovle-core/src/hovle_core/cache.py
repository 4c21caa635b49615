"""Key-value caches: one that appends in place, so that a step of `generate` costs its own token and not a copy of all
before it; one of a recurrent token mixer's state; and the room in static ones.

Shapes: B batch, K key-value heads, T cached tokens, C tokens there is room for, d head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticLayer
from transformers.cache_utils import DynamicLayer

# Room is made for this share of the tokens cached so far, so that n steps copy O(n) tokens in all.
GROWTH = 0.25
SMALLEST_GROWTH = 128
_PADDED = "hovle_rows_are_padded"


class GrowingLayer(DynamicLayer):
    """transformers' DynamicLayer without its `torch.cat` a step.

    `keys` and `values [B, K, T, d]` are views of the first T tokens of buffers `[B, K, C, d]`. What else transformers
    does to a layer (reorder, crop, repeat, offload) replaces the views; the next `update` notices and takes new
    buffers. Where gradients flow it concatenates as ever: a tensor in the graph must not be written to.
    """

    keys: Tensor  # None, in transformers' way, until the first update
    values: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[B, K, new, d]`; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled() and any(
            x.requires_grad for x in (self.keys, self.values, key_states, value_states)
        ):
            return super().update(key_states, value_states, *args, **kwargs)
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        if self._buffers is None or not self._fits(length):
            self._buffers = (
                self._grown(self.keys, key_states, past),
                self._grown(self.values, value_states, past),
            )
        keys, values = self._buffers
        keys[:, :, past:length] = key_states
        values[:, :, past:length] = value_states
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._buffers = None

    def _fits(self, length: int) -> bool:
        """Whether `keys` and `values` still are the buffers' first tokens, with room for `length`."""
        assert self._buffers is not None
        return length <= self._buffers[0].shape[2] and all(
            view.data_ptr() == buffer.data_ptr()
            and view.stride() == buffer.stride()
            and buffer.is_inference() == torch.is_inference_mode_enabled()  # else it must not be written to
            for view, buffer in zip((self.keys, self.values), self._buffers, strict=True)
        )

    @staticmethod
    def _grown(cached: Tensor, new: Tensor, past: int) -> Tensor:
        B, K, T, d = new.shape
        room = max(SMALLEST_GROWTH, int((past + T) * GROWTH))
        buffer = new.new_empty(B, K, past + T + room, d)
        if past:
            buffer[:, :, :past] = cached
        return buffer


class StateLayer(DynamicLayer):
    """What a recurrent token mixer keeps: one `state [B, ...]` of all `tokens` so far.

    It lies where DynamicLayer has its keys, so that transformers reorders, repeats and selects its rows.
    """

    is_croppable = False
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.tokens = 0

    @property
    def state(self) -> Tensor | None:
        """None before the first token."""
        return self.keys if self.is_initialized else None

    def keep(self, state: Tensor, tokens: int) -> None:
        """`state [B, ...]` holds `tokens` more tokens than the last one."""
        self.dtype, self.device, self.is_initialized = state.dtype, state.device, True
        self.keys, self.values = state, state.new_empty(state.shape[0], 0)
        self.tokens += tokens

    def get_seq_length(self) -> int:
        return self.tokens

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.tokens = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: a state cannot give tokens back."""
        if tokens_to_remove:
            raise ValueError(
                "a recurrent token mixer's state cannot forget its last tokens (past_key_values.crop, assisted "
                "decoding): generate without an assistant"
            )


def hold_states(cache: Cache, first: int, recurrent: Sequence[int]) -> None:
    """Exchange empty layers for StateLayers: those of embedding blocks `recurrent`, whose layers start at `first`.

    Raises ValueError for layers of a fixed size, and for those that hold keys and values already.
    """
    for i in (first + block for block in recurrent if first + block < len(cache.layers)):
        layer = cache.layers[i]
        if isinstance(layer, StateLayer):
            continue
        if not isinstance(layer, DynamicLayer) or layer.get_seq_length():
            raise ValueError(
                f"past_key_values has a {type(layer).__name__} for embedding block {i - first}, whose token mixer "
                "keeps a state: use an empty DynamicCache(config=model.config), no static cache"
            )
        cache.layers[i] = StateLayer()


def grow_in_place(cache: Cache) -> None:
    """Exchange the empty DynamicLayers of a cache for GrowingLayers; other kinds (sliding, static, quantised) stay."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[i] = GrowingLayer()


def check_room(cache: Cache, tokens: int, where: str) -> None:
    """Raise ValueError unless every static layer holds `tokens`, cached and new: torch would name an index."""
    room = min((layer.max_cache_len for layer in _static_layers(cache)), default=tokens)
    if tokens > room:
        raise ValueError(
            f"past_key_values is a static cache of {room} tokens in {where}, and this needs {tokens}: make one with a "
            "larger max_cache_len, or use a DynamicCache"
        )


def make_room(blocks: Cache, llm: Cache, tokens: int, more: int) -> None:
    """Size a static cache for HoVLE-HD's blocks, which hold `more` tokens than the LLM of a prompt of `tokens`.

    `max_cache_len` counts the LLM's tokens. An empty cache (new or reset) takes the room that this prompt and the text
    after it need. Raises ValueError where it is too small for the LLM, or where cached tokens bar it from growing.
    """
    if not (layers := _static_layers(blocks)):
        return
    seen = int(llm.get_seq_length()) + tokens
    check_room(llm, seen, "the LLM")
    longest = max((layer.max_cache_len for layer in _static_layers(llm)), default=0)
    for layer in layers:
        past = int(layer.get_seq_length())
        needed = past + tokens + more
        if not past:
            # An LLM of sliding windows alone does not say how long it may get; a layer that was never used does.
            text = longest or (seen if layer.is_initialized else layer.max_cache_len)
            needed += max(0, text - seen)
        if needed <= layer.max_cache_len:
            continue
        if past:
            raise ValueError(
                f"past_key_values is a static cache of {layer.max_cache_len} tokens in the embedding blocks, and "
                f"HoVLE-HD needs {needed} with these pictures; use a DynamicCache to add pictures turn by turn"
            )
        layer.max_cache_len, layer.is_initialized = needed, False


def note_padding(blocks: Cache, padded: bool) -> None:
    """Note whether HoVLE-HD's blocks padded a cache's first rows: they do where pictures differ in number, and neither
    the LLM's mask nor what is cached tells."""
    setattr(blocks.layers[0], _PADDED, padded)


def is_padded(blocks: Cache) -> bool:
    """What `note_padding` noted."""
    return bool(getattr(blocks.layers[0], _PADDED, False))


def _static_layers(cache: Cache) -> list[StaticLayer]:
    """Those that end somewhere: sliding windows wrap around."""
    return [layer for layer in cache.layers if isinstance(layer, StaticLayer) and not layer.is_sliding]

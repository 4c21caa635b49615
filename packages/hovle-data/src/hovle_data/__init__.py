"""Training data for HoVLE: WebDataset shards in, exact, balanced and resumable packed batches out.

Names are imported on first use, so that listing plugins or reading shards loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hovle_data.decode import decode_image
    from hovle_data.index import ShardIndex
    from hovle_data.mixture import Mixture
    from hovle_data.order import Permutation, position_to_index
    from hovle_data.packing import PackedBatch, pack
    from hovle_data.pipeline import StepLoader
    from hovle_data.quarantine import Ledger, TooManyBadSamples
    from hovle_data.rows import RowLoader
    from hovle_data.schema import BadSample, Message, Sample
    from hovle_data.shards import ShardSource, write_shards
    from hovle_data.streams import ConversationStream, PairStream, Stream, TextStream, UnpairedStream

_MODULES = {
    "decode": ("decode_image",),
    "index": ("ShardIndex",),
    "mixture": ("Mixture",),
    "order": ("Permutation", "position_to_index"),
    "packing": ("PackedBatch", "pack"),
    "pipeline": ("StepLoader",),
    "quarantine": ("Ledger", "TooManyBadSamples"),
    "rows": ("RowLoader",),
    "schema": ("BadSample", "Message", "Sample"),
    "shards": ("ShardSource", "write_shards"),
    "streams": ("ConversationStream", "PairStream", "Stream", "TextStream", "UnpairedStream"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BadSample",
    "ConversationStream",
    "Ledger",
    "Message",
    "Mixture",
    "PackedBatch",
    "PairStream",
    "Permutation",
    "RowLoader",
    "Sample",
    "ShardIndex",
    "ShardSource",
    "StepLoader",
    "Stream",
    "TextStream",
    "TooManyBadSamples",
    "UnpairedStream",
    "decode_image",
    "pack",
    "position_to_index",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hovle_data' has no attribute {name!r}")
    value = getattr(import_module(f"hovle_data.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value

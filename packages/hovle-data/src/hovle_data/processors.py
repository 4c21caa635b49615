"""The processor of a checkpoint, as it is or for counting alone."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hovle_core.images import decode_image


@lru_cache(maxsize=1)
def load_processor(path: str) -> Any:
    """The processor of a checkpoint, a finished run or a folder. Raises ValueError for a run that has not finished."""
    from hovle_core.processor import HovleProcessor
    from hovle_core.runs import resolve_checkpoint

    return HovleProcessor.from_pretrained(resolve_checkpoint(path))


@lru_cache(maxsize=1)
def load_counter(path: str) -> Any:
    """The same, encoding into as many tokens and tiles, but the tiles are blank and one pixel large: to cut real ones
    takes ten times as long as all the rest. Pictures are decoded whole, so that broken ones are found."""
    from hovle_core.processor import HovleProcessor
    from hovle_core.runs import resolve_checkpoint

    processor: Any = HovleProcessor.from_pretrained(resolve_checkpoint(path))
    processor.image_processor = _BlankTiles(processor.image_processor)
    return processor


class _BlankTiles:
    def __init__(self, image_processor: Any) -> None:
        self.num_tiles = image_processor.num_tiles
        self.tile_size = 1

    def tiles_of_file(self, data: bytes) -> NDArray[np.uint8]:
        return np.zeros((self.num_tiles(*decode_image(data).size), 1, 1, 3), np.uint8)

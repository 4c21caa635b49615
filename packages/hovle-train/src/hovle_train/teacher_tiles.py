"""The tiles of a run's images, in batches for a teacher that looks at each of them once."""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hovle_core.processor import HovleProcessor
from hovle_data.decode import cut_tiles
from hovle_data.mixture import Mixture
from hovle_data.schema import BadSample

logger = logging.getLogger(__name__)

TEACHER_BATCH = 64


def tile_batches(
    mixture: Mixture, processor: HovleProcessor, first: int = 0
) -> Iterator[tuple[int, list[str], Tensor]]:
    """Images from the `first` on in the order of their sources: (number of the next one, tile keys, uint8 tiles
    `[N, 3, S, S]`), about TEACHER_BATCH tiles at a time.

    Pictures that cannot be read are passed over here: the stream quarantines and names them.
    """
    keys: list[str] = []
    tiles: list[np.ndarray] = []
    number = 0
    for name, source in zip(mixture.names, mixture.sources, strict=True):
        skipped = min(len(source), max(0, first - number))
        number += skipped
        for i in range(skipped, len(source)):
            number += 1
            try:
                sample = source[i]
                images = [cut_tiles(processor, image) for image in sample.images[:1]]
            except BadSample as bad:
                logger.info("teacher features: %s", bad)
                continue
            for cut in images:
                keys += [f"{name}/{sample.key}#{n}" for n in range(len(cut))]
                tiles.append(np.ascontiguousarray(cut))  # channels last: convolutions are fastest
            if len(keys) >= TEACHER_BATCH:
                yield number, keys, _joined(tiles)
                keys, tiles = [], []
    if tiles:
        yield number, keys, _joined(tiles)


def _joined(tiles: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(tiles)).permute(0, 3, 1, 2)

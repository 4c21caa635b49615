"""The two losses of HoVLE, as sums over targets: whoever knows the global number of targets divides.

Shapes: B batch, T tokens, K target positions, V vocabulary, M matched tokens, C channels.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

IGNORE_INDEX = -100


def next_token_loss(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Summed cross entropy of one packed row, `labels [1, T]` aligned with the tokens, -100 = no target.

    Logits are computed where there is a target and nowhere else (`[K, V]`, never `[T, V]`), in float32.
    Raises ValueError for more than one row: rows have different targets, pack them into one.
    """
    if labels.shape[0] != 1:
        raise ValueError(f"labels must be one packed row [1, T], got {list(labels.shape)}")
    keep = (labels[0, 1:] != IGNORE_INDEX).nonzero()[:, 0]
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits[0]
    return F.cross_entropy(logits.float(), labels[0, 1:][keep], reduction="sum")


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum of -cos(x̂, z) over `[M, C]` pairs (paper, eq. for distillation): -M when all directions agree."""
    return -F.cosine_similarity(student.float(), teacher.float(), dim=-1).sum()

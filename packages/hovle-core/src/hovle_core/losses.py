"""The two losses of HoVLE, as sums over targets: whoever knows the global number of targets divides.

Shapes: B batch, T tokens, K target positions, V vocabulary, M matched tokens, C channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hovle_core.config import HovleConfig

IGNORE_INDEX = -100
# Families whose logits are head(last hidden state) and nothing more: no soft cap, no scale.
PLAIN_HEADS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# Above this many bytes of float32 logits torch's chunked loss takes over: it saves memory and costs a little time.
LARGEST_LOGITS = 2**30
CHUNK_LOGITS = 2**28
ROWS_ON_CPU = 64


def next_token_loss(model: PreTrainedModel, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Summed cross entropy of a HoVLE or a bare LLM, `labels [B, T]` aligned with the tokens, -100 = no target."""
    if model.config.model_type != HovleConfig.model_type:
        return causal_lm_loss(model, labels, **inputs, use_cache=False)
    none = torch.empty(0, dtype=torch.long, device=labels.device)
    return model(**inputs, labels=labels, num_items_in_batch=1, logits_to_keep=none, use_cache=False).loss


def causal_lm_loss(language_model: PreTrainedModel, labels: Tensor, **inputs: Any) -> Tensor:
    """As next_token_loss, for a causal LLM called with `inputs`.

    The head runs where there is a target and nowhere else (`[K, V]`, never `[B, T, V]`). Families that are not known
    to have plain heads are called as they are, and give logits at every position that is a target in any row.
    The first token of a packed sample is no target (`within_samples`).
    """
    labels = within_samples(labels, inputs.get("position_ids"), inputs.get("attention_mask"))
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    is_target = targets != IGNORE_INDEX  # [B, T]
    if language_model.config.model_type in PLAIN_HEADS:
        hidden = language_model.get_decoder()(**inputs).last_hidden_state
        return head_loss(language_model.get_output_embeddings(), hidden[is_target], targets[is_target])
    keep = is_target.any(0).nonzero()[:, 0]
    logits = language_model(**inputs, logits_to_keep=keep).logits[is_target[:, keep]]
    return F.cross_entropy(logits.float(), targets[is_target], reduction="sum")


def within_samples(labels: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """`labels [B, T]` without the first token of each packed sample, which the sample before it would predict.

    position_ids: `[B, T]` or `[1, T]`; samples begin where they restart. With an attention_mask nothing is packed
    (`hovle_core.attention`), and the labels stay as they are.
    """
    if position_ids is None or attention_mask is not None:
        return labels
    starts = F.pad(torch.diff(position_ids, dim=1) != 1, (1, 0), value=False)
    return labels.masked_fill(starts, IGNORE_INDEX)


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy of `head(hidden)`, in float32: `hidden [K, D]`, `targets [K]`.

    Large ones go through torch's chunked loss where it wins (benchmarks/loss.py): not in bfloat16 on a CPU, whose
    matmuls it does in float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if device == "cpu" and dtype == torch.bfloat16:
        # oneDNN makes a kernel for each new number of rows: a few numbers are enough.
        missing = -targets.shape[0] % ROWS_ON_CPU
        hidden = F.pad(hidden, (0, 0, 0, missing))
        targets = F.pad(targets, (0, missing), value=IGNORE_INDEX)
    large = targets.shape[0] * getattr(head, "out_features", 0) * 4 > LARGEST_LOGITS
    served = hasattr(nn, "LinearCrossEntropyOptions") and (device != "cpu" or dtype == torch.float32)
    if not (large and served and type(head) is nn.Linear):
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    return F.linear_cross_entropy(
        hidden.to(dtype),
        head.weight.to(dtype),
        targets,
        linear_bias=None if head.bias is None else head.bias.to(dtype),
        reduction="sum",
        options=nn.LinearCrossEntropyOptions(
            batch_chunk_size=max(1, CHUNK_LOGITS // (4 * head.out_features))
        ),
    ).float()


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum of -cos(x̂, z) over `[M, C]` pairs (paper, eq. for distillation): -M when all directions agree."""
    return -F.cosine_similarity(student.float(), teacher.float(), dim=-1).sum()

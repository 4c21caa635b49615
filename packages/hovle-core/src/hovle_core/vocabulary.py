"""Whether a tokenizer means by its ids what an LLM learnt, and the LLM's embeddings laid out for one that does not.

Shapes: V, W tokens of the LLM's own tokenizer and of the new one, D hidden size.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hovle_core.processor import IMAGE_TOKENS

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def conflicts(tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> list[str]:
    """Tokens of `tokenizer` whose ids are other tokens in the LLM's `own`, by id; empty if it reads the same way.

    Tokens that `own` lacks may have ids that are free there. Picture tokens do not count: no LLM has learnt them.
    """
    meaning = {i: token for token, i in own.get_vocab().items() if token not in IMAGE_TOKENS}
    ids = sorted((i, token) for token, i in tokenizer.get_vocab().items() if token not in IMAGE_TOKENS)
    return [token for i, token in ids if meaning.get(i, token) != token]


@torch.no_grad()
def fit_embeddings(
    model: PreTrainedModel, own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Lay out the embeddings and the head of `model`, made for `own`, for `tokenizer` instead: `[V, D]` -> `[W, D]`.

    A token that both know keeps its row, at its new id; a new one starts as the mean of all old rows. Special ids of
    the configs follow. No paper's method: most new tokens mean nothing before the LLM is trained on them.
    """
    known = own.get_vocab()
    source = torch.full((len(tokenizer),), -1, dtype=torch.long)
    for token, i in tokenizer.get_vocab().items():
        source[i] = known.get(token, -1)
    head = model.get_output_embeddings()
    tables = [model.get_input_embeddings().weight]
    if head is not None and head.weight is not tables[0]:
        tables.append(head.weight)
    moved = [_moved(table, source, len(known)) for table in tables]
    bias = None if head is None or head.bias is None else _moved(head.bias, source, len(known))
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.get_input_embeddings().weight.copy_(moved[0])
    if len(moved) == 2:
        model.get_output_embeddings().weight.copy_(moved[1])
    if bias is not None:
        model.get_output_embeddings().bias.copy_(bias)
    for config in (model.config.get_text_config(), model.generation_config):
        for field in _SPECIAL:
            setattr(config, field, getattr(tokenizer, field))


def _moved(rows: Tensor, source: Tensor, num_known: int) -> Tensor:
    """`rows[source]`, and the mean of the first `num_known` where `source` is -1."""
    new = rows[source.clamp(min=0)].clone()
    new[source < 0] = rows[:num_known].mean(0)
    return new

"""Attention over packed short samples on this machine: `hovle_packed` against SDPA with transformers' block mask.

64 samples of about 40 tokens in one row, forward and backward of a tiny HoVLE's loss, by turns in one process.
"""

import json
import time

import torch

from hovle_core import HovleForConditionalGeneration
from hovle_core.attention import PACKED_ATTENTION
from hovle_core.losses import next_token_loss
from hovle_core.testing import tiny_embedding_config, tiny_llm, tiny_tokenizer

SAMPLES, LENGTH, REPEATS = 64, 40, 7
SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4}


def main() -> None:
    tokenizer = tiny_tokenizer()
    llm = tiny_llm(len(tokenizer), num_hidden_layers=4, **SIZES)
    embedding = tiny_embedding_config(len(tokenizer), num_hidden_layers=4, **SIZES)
    model = HovleForConditionalGeneration.from_language_model(llm, embedding, len(tokenizer) - 1)
    lengths = [LENGTH + i % 7 - 3 for i in range(SAMPLES)]
    ids = torch.randint(3, 200, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = torch.where(positions == 0, -100, ids)
    inputs = {"input_ids": ids, "position_ids": positions}
    seconds: dict[str, list[float]] = {PACKED_ATTENTION: [], "sdpa": []}
    for _ in range(REPEATS):
        for name in seconds:
            model.set_attn_implementation(name)
            start = time.perf_counter()
            next_token_loss(model, inputs, labels).backward()
            seconds[name].append(time.perf_counter() - start)
            model.zero_grad()
    median = {name: round(sorted(times)[REPEATS // 2], 3) for name, times in seconds.items()}
    print(
        f"median of {REPEATS} in float32, {sum(lengths)} tokens, {torch.get_num_threads()} threads: {median}"
    )
    ratio = median["sdpa"] / median[PACKED_ATTENTION]
    print(json.dumps({"benchmark": "packed_attention", "ratio_sdpa": round(ratio, 2)}))


if __name__ == "__main__":
    main()

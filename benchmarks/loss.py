"""Loss and backward at the released vocabulary: what stages and `model(labels=...)` use, against all logits.

4,096 tokens with a quarter of them targets, hidden size 2048, vocabulary 92,553. Each side runs in a child process of
its own, one after the other: only a process tells its peak. Memory is how far the child's peak resident set
(ru_maxrss) rises over what it holds before the first step: gradients count, weights do not. Time is the faster of two
steps. Under bfloat16 autocast only where the CPU is fast at it: elsewhere, where nothing of ours uses it, each of those
steps takes minutes.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hovle_core.losses import next_token_loss
from hovle_core.precision import has_fast_bfloat16

TOKENS, TARGET_SHARE, HIDDEN, VOCAB, STEPS = 4096, 0.25, 2048, 92553, 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plain_loss(
    model: LlamaForCausalLM, inputs: dict[str, torch.Tensor], labels: torch.Tensor
) -> torch.Tensor:
    logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1].float(), labels[0, 1:], reduction="sum")


def child(side: str, precision: str, folder: str) -> None:
    """One side: prints its peak and time, leaves its gradients in `folder`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=0, num_attention_heads=16, tie_word_embeddings=True
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    hidden = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    labels = torch.randint(VOCAB, (1, TOKENS))
    labels[torch.rand(labels.shape) > TARGET_SHARE] = -100
    loss_of = plain_loss if side == "plain" else next_token_loss
    parameters = [hidden, model.lm_head.weight]
    for _ in range(64):  # the thread pool and the matmul's own buffers
        torch.randn(64, 64) @ torch.randn(64, 64)
    before, seconds = psutil.Process().memory_info().rss, []
    for _ in range(STEPS):
        for parameter in parameters:
            parameter.grad = None
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = loss_of(model, {"inputs_embeds": hidden}, labels)
        loss.backward()
        seconds.append(time.perf_counter() - start)
        del loss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gradients = {"hidden": hidden.grad, "head": model.lm_head.weight.grad}
    save_file(gradients, Path(folder) / f"{side}.safetensors")
    print(json.dumps({"bytes": peak - before, "seconds": min(seconds)}))


def compare(precision: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for side in ("plain", "ours"):
            command = [sys.executable, __file__, side, precision, folder]
            results[side] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(
                f"{precision:9}{side:6}{results[side]['bytes'] / 2**20:7.0f} MiB{results[side]['seconds']:8.2f} s"
            )
        plain, ours = (load_file(Path(folder) / f"{side}.safetensors") for side in ("plain", "ours"))
    difference = max(float((plain[n] - ours[n]).abs().max() / plain[n].abs().max()) for n in plain)
    return {
        "memory_ratio": round(results["ours"]["bytes"] / results["plain"]["bytes"], 3),
        "time_ratio": round(results["ours"]["seconds"] / results["plain"]["seconds"], 3),
        "gradient_difference": float(f"{difference:.1e}"),
    }


def main() -> None:
    print(
        f"{TOKENS} tokens, {TARGET_SHARE:.0%} targets, vocabulary {VOCAB}, {torch.get_num_threads()} threads"
    )
    autocast = {}
    if has_fast_bfloat16(torch.device("cpu")):
        autocast = {f"{name}_bfloat16": value for name, value in compare("bfloat16").items()}
    print(json.dumps({"benchmark": "loss", **compare("float32"), **autocast}))


if __name__ == "__main__":
    child(*sys.argv[1:]) if len(sys.argv) > 1 else main()

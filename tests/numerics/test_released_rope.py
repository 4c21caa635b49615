"""RoPE past `max_position_embeddings` as the released code has it: `dynamic` (NTK) and `linear`, in a full forward.

The oracle is an InternLM2 and its embedding written out here from the released layout (hovle-spec, section 1), on the
released tensors themselves; the golden logits check the oracle first.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from hovle_core import HovleForConditionalGeneration

GOLDEN = Path(__file__).parents[1] / "golden"


class Reference:
    """The released forward on one sample without padding."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.w = load_file(folder / "model.safetensors")

    def angles(self, config: dict, length: int) -> torch.Tensor:
        """Angles `[length, head_dim / 2]`, base and positions as `rope_scaling` of `config` says."""
        d = config["hidden_size"] // config["num_attention_heads"]
        base, positions = config["rope_theta"], torch.arange(length, dtype=torch.float32)
        scaling, most = config["rope_scaling"], config["max_position_embeddings"]
        if scaling is not None and scaling["type"] == "linear":
            positions = positions / scaling["factor"]
        elif scaling is not None and length > most:  # the released code starts scaling where the table ends
            s = scaling["factor"]
            base = base * ((s * length / most) - (s - 1)) ** (d / (d - 2))
        frequencies = 1.0 / base ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
        return positions[:, None] * frequencies

    def stack(self, x: torch.Tensor, prefix: str, config: dict) -> torch.Tensor:
        """Causal blocks under `prefix`, `[T, D] -> [T, D]`."""
        H, K = config["num_attention_heads"], config["num_key_value_heads"]
        T, d = x.shape[0], config["hidden_size"] // config["num_attention_heads"]
        angles = self.angles(config, T).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()

        def norm(x, name):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * self.w[name]

        def rotate(x):  # [heads, T, d]
            return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin

        for i in range(config["num_hidden_layers"]):
            w = {name: self.w[f"{prefix}.{i}.{name}.weight"] for name in (
                "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")}  # fmt: skip
            qkv = (norm(x, f"{prefix}.{i}.attention_norm.weight") @ w["attention.wqkv"].T).view(
                T, K, H // K + 2, d
            )
            q = rotate(qkv[:, :, :-2].reshape(T, H, d).transpose(0, 1))
            k = rotate(qkv[:, :, -2].transpose(0, 1)).repeat_interleave(H // K, 0)
            v = qkv[:, :, -1].transpose(0, 1).repeat_interleave(H // K, 0)
            scores = (q @ k.transpose(1, 2) / d**0.5).masked_fill(
                torch.ones(T, T).triu(1).bool(), float("-inf")
            )
            x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1) @ w["attention.wo"].T
            h = norm(x, f"{prefix}.{i}.ffn_norm.weight")
            x = (
                x
                + (F.silu(h @ w["feed_forward.w1"].T) * (h @ w["feed_forward.w3"].T)) @ w["feed_forward.w2"].T
            )
        return x

    def shuffle(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, L, C]` -> `[N, L / 4, C]`: pixel shuffle and its projection."""
        n, L, C = x.shape
        side = round(L**0.5)
        x = x.reshape(n, side, side // 2, C * 2).permute(0, 2, 1, 3)
        x = x.reshape(n, side // 2, side // 2, C * 4).permute(0, 2, 1, 3).reshape(n, L // 4, C * 4)
        w0, b0, w2, b2 = (
            self.w[f"embedding_model.pixel_shuffle_proj.{name}"]
            for name in ("0.weight", "0.bias", "2.weight", "2.bias")
        )
        return F.linear(F.gelu(F.linear(x, w0, b0)), w2, b2)

    def logits(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """`[T]` and `[N, 3, S, S]` -> `[T, V]`."""
        embedding, llm, w = self.config["embedding_config"], self.config["llm_config"], self.w
        is_image = input_ids == embedding["img_context_token_id"]
        post = embedding["pixel_shuffle_loc"] == "post"
        x = w["embedding_model.llm_text_embeddings.weight"][input_ids]
        wide_is_image = is_image
        if pixel_values is not None:
            v = "embedding_model.vision_embeddings."
            patches = F.conv2d(
                pixel_values, w[v + "patch_embedding.weight"], w[v + "patch_embedding.bias"], stride=14
            )
            patches = patches.flatten(2).transpose(1, 2) + w[v + "position_embedding"][:, 1:]
            if post:
                repeats = torch.where(is_image, 4, 1)
                x, wide_is_image = x.repeat_interleave(repeats, 0), is_image.repeat_interleave(repeats)
            else:
                patches = self.shuffle(patches)
            x[wide_is_image] = patches.flatten(0, 1)
        x = self.stack(x, "embedding_model.encoder", embedding)
        if post and pixel_values is not None:
            narrow = torch.empty(len(input_ids), x.shape[1])
            narrow[~is_image] = x[~wide_is_image]
            narrow[is_image] = self.shuffle(x[wide_is_image].view(len(pixel_values), -1, x.shape[1])).flatten(
                0, 1
            )
            x = narrow
        x = self.stack(x, "language_model.model.layers", llm)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + llm["rms_norm_eps"])
        return x * w["language_model.model.norm.weight"] @ w["language_model.output.weight"].T


@pytest.fixture(params=["hovle-tiny", "hovle-hd-tiny"])
def name(request):
    return request.param


@torch.no_grad()
def test_the_reference_computes_the_golden_logits(name):
    io = load_file(GOLDEN / name / "io.safetensors")
    reference = Reference(GOLDEN / name)
    logits = reference.logits(io["input_ids"][0], io["pixel_values"])
    torch.testing.assert_close(logits, io["logits"][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        reference.logits(io["text_input_ids"][0], None), io["text_logits"][0], atol=1e-4, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "linear"])
def test_scaled_rope_past_the_table(name, kind, tmp_path):
    """Positions run past both stacks' tables; each stack counts its own."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    for part, most in (("embedding_config", 12), ("llm_config", 7)):
        config[part] |= {"rope_scaling": {"type": kind, "factor": 2.0}, "max_position_embeddings": most}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(GOLDEN / name / "model.safetensors")
    io = load_file(GOLDEN / name / "io.safetensors")
    assert io["input_ids"].shape[1] > 12
    reference = Reference(tmp_path)
    model = HovleForConditionalGeneration.from_pretrained(tmp_path).eval()
    logits = model(input_ids=io["input_ids"], pixel_values=io["pixel_values"]).logits[0]
    want = reference.logits(io["input_ids"][0], io["pixel_values"])
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)
    assert (want - io["logits"][0]).abs().max() > 0.05  # scaling matters here
    # A short text after a long one is not scaled by what came before it.
    short = io["text_input_ids"][:, :6]
    torch.testing.assert_close(model(short).logits[0], reference.logits(short[0], None), atol=1e-4, rtol=0)
    long = io["text_input_ids"].repeat(1, 4)
    torch.testing.assert_close(model(long).logits[0], reference.logits(long[0], None), atol=1e-4, rtol=0)

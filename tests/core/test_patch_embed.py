"""Patches as a matrix product are the convolution whose weights they use."""

import torch
from torch.nn import functional as F

from hovle_core.config import HolisticEmbeddingConfig
from hovle_core.patch_embed import PatchEmbed, to_patches


def test_patches_times_weights_are_the_convolution_with_its_gradients():
    torch.manual_seed(0)
    config = HolisticEmbeddingConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=4, image_size=56, patch_size=14
    )
    embed = PatchEmbed(config).double()
    torch.nn.init.zeros_(embed.position_embedding)
    pixels = torch.randn(3, 3, 56, 56, dtype=torch.float64)
    conv = embed.patch_embedding
    want = F.conv2d(pixels, conv.weight, conv.bias, conv.stride).flatten(2).transpose(1, 2)
    gradients = torch.autograd.grad(want.square().sum(), [conv.weight, conv.bias])
    got = embed(pixels)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(got.square().sum(), [conv.weight, conv.bias]), gradients, strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-10)


def test_what_fills_no_patch_is_left_out_as_by_a_convolution():
    pixels = torch.arange(2 * 5 * 7, dtype=torch.float32).reshape(1, 2, 5, 7)
    patches, rows, columns = to_patches(pixels, 2)
    assert (rows, columns, tuple(patches.shape)) == (2, 3, (1, 6, 8))
    assert torch.equal(patches[0, 4].reshape(2, 2, 2), pixels[0, :, 2:4, 2:4])

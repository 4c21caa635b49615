"""InternVL's connector: from its vision encoder's grid to what its LLM reads.

Shapes: N tiles, h x w the encoder's grid (square), C its channels, s = 2, D the LLM's hidden size.
"""

from pathlib import Path

from torch import Tensor, nn

from hovle_core.patch_embed import pixel_shuffle
from hovle_teacher_timm.weights import load_strictly, read_safetensors

FACTOR = 2


class Connector(nn.Sequential):
    """Pixel shuffle, norm, two linear layers: `[N, h, w, C] -> [N, h / s, w / s, D]`."""

    def __init__(self, feature_size: int, size: int):
        self.size = size
        wide = feature_size * FACTOR**2
        super().__init__(nn.LayerNorm(wide), nn.Linear(wide, size), nn.GELU(), nn.Linear(size, size))

    @classmethod
    def load(cls, path: Path, feature_size: int) -> "Connector":
        """From `mlp1.{0,1,3}.*` of an InternVL checkpoint (other tensors may be there). Raises ValueError where they
        are missing or do not fit the encoder."""
        state = {
            name.removeprefix("mlp1."): tensor
            for name, tensor in read_safetensors(path).items()
            if name.startswith("mlp1.")
        }
        if "3.bias" not in state:
            raise ValueError(f"connector: {path} holds no mlp1.3.bias; give the file with InternVL's mlp1.*")
        connector = cls(feature_size, state["3.bias"].shape[0])
        load_strictly(connector, state, str(path))
        return connector

    def forward(self, features: Tensor) -> Tensor:
        n, side = features.shape[:2]
        x = pixel_shuffle(features.flatten(1, 2), FACTOR)
        return super().forward(x).view(n, side // FACTOR, side // FACTOR, -1)

"""Tensors that ranks hold shares of (FSDP2's DTensors) and the whole ones that checkpoints and Muon want.

Plain tensors pass through, so that callers need not ask which they have.
"""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from its ranks, which must all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's share, sharing memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_like(like: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor as this rank holds `like`: its device, and its shards where it has some. Nothing is sent."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def as_share_of(like: Tensor, share: Tensor) -> Tensor:
    """A tensor of which this rank has `share`, laid out over ranks as `like` is."""
    if not isinstance(like, DTensor):
        return share
    return DTensor.from_local(
        share, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )

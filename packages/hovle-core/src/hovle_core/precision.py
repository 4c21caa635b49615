"""Where bfloat16 is fast."""

import logging
import platform

import torch

logger = logging.getLogger(__name__)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matmuls are faster than float32's: CUDA since Ampere, CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_amx_tile_supported()
    return False


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto` -> bfloat16 where it is fast, else float32 with a warning."""
    if precision == "auto":
        precision = "bfloat16" if has_fast_bfloat16(device) else "float32"
        if precision == "float32":
            logger.warning(
                "this %s has no fast bfloat16: computing in float32, several times slower", device.type
            )
    return getattr(torch, precision)

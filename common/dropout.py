"""Dropout masks, drawn apart from the network so that runs can share them."""

import numpy as np
import torch
from torch import Tensor


def dropout_masks(shape: tuple[int, ...], rate: float, generator: torch.Generator) -> Tensor:
    """Zeros with probability ``rate`` (to 1/256), else the scale that keeps the mean.

    One draw of 64 random bits serves eight units: on a CPU eight times cheaper than a draw each.
    """
    threshold = min(round(rate * 256), 255)
    draws = torch.empty(-(-int(np.prod(shape)) // 8), dtype=torch.int64, device=generator.device)
    random_bytes = draws.random_(-(2**63), None, generator=generator).view(torch.uint8)
    keep = random_bytes[: int(np.prod(shape))].view(shape) >= threshold
    return keep * (256 / (256 - threshold))

"""Deterministic weights made from parameter names alone, so that two implementations of SSP can be compared."""

import zlib

import numpy as np
import torch


def tensor_for(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The reference value, float32 of `shape`, of the authors' parameter or buffer `name`."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    values: np.ndarray = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        values = (0.002 if name == "disc.bn1.running_var" else 0.5) * (0.5 + np.abs(values))
    elif name.endswith("running_mean"):
        values = 0.01 * values
    elif ".bn" in name or "downsample.1" in name:
        values = 0.5 + 0.1 * np.abs(values) if name.endswith("weight") else 0.01 * values
    elif name.endswith("weight"):
        fan = shape[0] * np.prod(shape[2:]) if len(shape) == 4 else shape[1]
        values = values * np.sqrt(2.0 / fan).astype(np.float32)
    else:
        values = 0.1 * values
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).reshape(shape)

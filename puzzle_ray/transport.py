"""Tensors as numpy containers: Ray reads those from shared memory without copying. What arrives is read-only: never write to it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Container = npt.NDArray[Any]


def pack(tensor: Tensor, dtype: torch.dtype) -> Container:
    """`tensor` in `dtype` as a numpy array; 16-bit floats travel as uint16."""
    tensor = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    return tensor.numpy() if dtype == torch.float32 else tensor.view(torch.uint16).numpy()


def unpack(container: Container, dtype: torch.dtype) -> Tensor:
    """The tensor again, sharing the container's memory; `dtype` is what it was packed in."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(container)
    return tensor if container.dtype == np.float32 else tensor.view(dtype)

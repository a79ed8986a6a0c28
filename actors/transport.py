"""How tensors travel between processes. A new way is a class here and a name in TRANSPORTS."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puzzle_ray.errors import ConfigError
from puzzle_ray.plugins import did_you_mean

Container = npt.NDArray[Any]


class Transport(Protocol):
    """Both ends of the way: what a sender returns for a tensor, and the tensor that the receiver makes of what arrives."""

    method_options: Mapping[str, Any]  # of the Ray actor methods whose returns travel this way

    def pack(self, tensor: Tensor, dtype: torch.dtype) -> Any:
        """What travels of `tensor`, in `dtype`; it has `nbytes`."""

    def unpack(self, packed: Any, dtype: torch.dtype) -> Tensor:
        """The tensor again, in the `dtype` it was packed in. It may be shared with other receivers: never write to it."""


class ObjectStore:
    """Numpy containers: Ray reads those from a node's shared memory without copying. What arrives is read-only."""

    method_options: Mapping[str, Any] = {}

    def pack(self, tensor: Tensor, dtype: torch.dtype) -> Container:
        """16-bit floats travel as uint16, which numpy knows."""
        tensor = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        return tensor.numpy() if dtype == torch.float32 else tensor.view(torch.uint16).numpy()

    def unpack(self, packed: Container, dtype: torch.dtype) -> Tensor:
        """Shares the container's memory."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensor = torch.from_numpy(packed)
        return tensor if packed.dtype == np.float32 else tensor.view(dtype)


TRANSPORTS: Mapping[str, Transport] = {"object_store": ObjectStore()}


def find_transport(name: str) -> Transport:
    """Raises ConfigError for a name that is none."""
    if name not in TRANSPORTS:
        raise ConfigError("cluster.transport", f"unknown transport {name!r}", did_you_mean(name, TRANSPORTS))
    return TRANSPORTS[name]

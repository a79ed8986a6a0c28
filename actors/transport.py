"""How tensors travel between processes. A new way is a class here and a name in TRANSPORTS."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
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

    def pack_all(self, tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Any]:
        """The same for tensors that are computed one after the other."""

    def unpack(self, packed: Any, dtype: torch.dtype) -> Tensor:
        """The tensor again, in the `dtype` it was packed in. It may be shared with other receivers: never write to it."""


def packed_positions(position_ids: Tensor | None) -> Container | None:
    """Position ids as they travel beside hidden states: four bytes a token."""
    return None if position_ids is None else position_ids.to(torch.int32).numpy()


def unpacked_positions(packed: Container | None, device: torch.device) -> Tensor | None:
    """The same where they arrive."""
    return None if packed is None else torch.from_numpy(packed.astype(np.int64)).to(device)


class HostCopies:
    """Copies from a GPU to the host while the GPU goes on computing; a tensor of the host is its own copy.

    They go over a stream of their own into pinned memory, one buffer for each of a round. The next round fills the same buffers: what
    came of a round is to be sent before, as Ray does with what an actor's method returns.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used = 0
        self._stream: torch.cuda.Stream | None = None

    def start(self, tensor: Tensor) -> Tensor:
        """The copy. It is whole after `wait`."""
        if tensor.device.type != "cuda":
            return tensor
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        buffer = self._buffers[self._used] if self._used < len(self._buffers) else None
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            with torch.inference_mode(False):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._buffers[self._used : self._used + 1] = [buffer]
        self._used += 1
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is not given to another tensor before it is copied
        return buffer

    def wait(self) -> None:
        """Ends a round: all its copies are whole."""
        if self._stream is not None:
            self._stream.synchronize()
        self._used = 0


class ObjectStore:
    """Numpy containers: Ray reads those from a node's shared memory without copying. What arrives is read-only."""

    method_options: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.copies = HostCopies()

    def pack(self, tensor: Tensor, dtype: torch.dtype) -> Container:
        """16-bit floats travel as uint16, which numpy knows."""
        tensor = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        return tensor.numpy() if dtype == torch.float32 else tensor.view(torch.uint16).numpy()

    def pack_all(self, tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Container]:
        """While a GPU computes one of them, those before it are copied."""
        try:
            on_host = [self.copies.start(tensor.detach().to(dtype).contiguous()) for tensor in tensors]
        finally:
            self.copies.wait()
        return [self.pack(tensor, dtype) for tensor in on_host]

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

"""What is gathered about a parent layer on calibration tokens, to start its variants well without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import KINDS, SubblockKind
from puzzle_ray.families import Descriptor


class _Moments:
    """Second moments of a subblock's input X and output Y, tokens as rows: X'X, X'Y and the sum of squares of Y."""

    def __init__(self) -> None:
        self.xx: Tensor | None = None
        self.xy: Tensor | None = None
        self.yy = 0.0

    def add(self, x_ND: Tensor, y_ND: Tensor) -> None:
        x_ND, y_ND = x_ND.float(), y_ND.float()
        xx, xy = (x_ND.T @ x_ND).double(), (x_ND.T @ y_ND).double()
        self.xx = xx if self.xx is None else self.xx + xx
        self.xy = xy if self.xy is None else self.xy + xy
        self.yy += float(y_ND.square().sum(dtype=torch.float64))

    def least_squares(self, ridge: float = 1e-6) -> Tensor:
        """The `[out, in]` weight that predicts Y from X best, with a little ridge."""
        assert self.xx is not None and self.xy is not None, "no calibration tokens were seen"
        damping = ridge * self.xx.diagonal().mean().clamp_min(1e-30)
        eye = torch.eye(len(self.xx), dtype=self.xx.dtype, device=self.xx.device)
        return torch.linalg.solve(self.xx + damping * eye, self.xy).T

    def relative_error(self, weight_OI: Tensor) -> float:
        """||Y - X W'||^2 / ||Y||^2 of a linear map, from the moments alone. 1 is no better than predicting zero."""
        assert self.xx is not None and self.xy is not None, "no calibration tokens were seen"
        weight = weight_OI.double()
        squared = self.yy - 2 * (weight.T * self.xy).sum() + ((weight @ self.xx) * weight).sum()
        return float(squared) / max(self.yy, 1e-30)


class Statistics:
    """Moments of both subblocks, and the mean |activation| of every FFN channel."""

    def __init__(self) -> None:
        self.moments: dict[SubblockKind, _Moments] = {kind: _Moments() for kind in KINDS}
        self.channel_sum: Tensor | None = None
        self.tokens = 0

    @property
    def channel_mean_F(self) -> Tensor:
        """Mean |X_i| over tokens for every FFN channel i."""
        assert self.channel_sum is not None, "no calibration tokens were seen"
        return self.channel_sum / max(1, self.tokens)

    @contextmanager
    def watch(self, layer: nn.Module, descriptor: Descriptor) -> Iterator[None]:
        """While open, every forward of `layer` adds to the statistics."""
        down = layer.get_submodule(f"{descriptor.ffn}.{descriptor.ffn_down}")

        def on_down(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_NF = args[0].detach().flatten(0, -2)
            total = x_NF.abs().sum(dim=0, dtype=torch.float64)
            self.channel_sum = total if self.channel_sum is None else self.channel_sum + total
            self.tokens += len(x_NF)

        def on_subblock(kind: SubblockKind) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
                x = args[0] if args else kwargs["hidden_states"]
                y = output[0] if isinstance(output, tuple) else output
                self.moments[kind].add(x.detach().flatten(0, -2), y.detach().flatten(0, -2))

            return hook

        handles = [down.register_forward_pre_hook(on_down)]
        for kind in KINDS:
            module = layer.get_submodule(descriptor.module(kind))
            handles.append(module.register_forward_hook(on_subblock(kind), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

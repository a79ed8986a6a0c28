"""Statistics of a parent layer on calibration tokens. Variants are initialised from them, before any training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import KINDS, SubblockKind
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.surgery.subblocks import LinearAttention, LinearFFN, NoopAttention, NoopFFN

# N tokens, D hidden size, F inner activations; O and I the output and input features of a projection
REPLACED = (LinearAttention, LinearFFN, NoopAttention, NoopFFN)
INPUTS, HEADS, CHANNELS = "inputs", "heads", "channels"
ALL_STATISTICS = frozenset({INPUTS, HEADS, CHANNELS})


# Least squares are damped by a share of the moment's mean diagonal. Of these shares the largest is chosen whose error on tokens that it
# was not fitted on is within `WITHIN` of the best: it costs next to nothing, and it keeps matrices from having huge entries that cancel.
DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
WITHIN = 0.03


def largest_damping(error_of: Callable[[float], float]) -> tuple[float, float]:
    """(damping, its error). `error_of(damping)` is the relative error on unseen tokens of what is fitted with it."""
    errors = {damping: max(0.0, error_of(damping)) for damping in DAMPINGS}  # rounding may leave less than 0
    bound = min(errors.values()) * (1 + WITHIN) + 1e-9
    damping = max(damping for damping, error in errors.items() if error <= bound)
    return damping, errors[damping]


def _sum_to(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


def _with_product(total: Tensor | None, x_NI: Tensor, y_NO: Tensor) -> Tensor:
    """`total` and X'Y, `[I, O]`, of float32 activations X `[tokens, I]` and Y `[tokens, O]`, on their device; in place of `total`.

    The product is taken in float32 and added up in float64. The rounding of a product is random, and falls with the number of tokens. A
    float32 sum would round every product again, at the scale of the whole sum, and least squares with a damping of 1e-6 divide by what is
    a millionth of that scale.
    """
    product = x_NI.T @ y_NO
    return product.double() if total is None else total.add_(product)


def with_ridge(moment: Tensor, share: float = 1e-6) -> Tensor:
    """A moment matrix with `share` of its mean diagonal added to the diagonal, so that it can be inverted."""
    damping = share * moment.diagonal().mean().clamp_min(1e-30)
    return moment + damping * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


class Moments:
    """Second moments of a subblock's input X and output Y, summed over calibration tokens.

    X is `[tokens, hidden_size + 1]`: the subblock's (normed) input with a column of ones behind it. Y is `[tokens, hidden_size]`.
    `xx` is X'X, `[hidden_size + 1, hidden_size + 1]`. `xy` is X'Y, `[hidden_size + 1, hidden_size]`. Both are sums in float64 of
    float32 products. `yy` is the sum of squares of Y. `xx` and `xy` are None before the first tokens.
    """

    def __init__(self) -> None:
        self.xx: Tensor | None = None
        self.xy: Tensor | None = None
        self.yy = 0.0

    def add(self, x_ND: Tensor, y_ND: Tensor) -> None:
        """Adds tokens: inputs and outputs, each `[tokens, hidden_size]` in any dtype."""
        x_ND = torch.nn.functional.pad(x_ND.float(), (0, 1), value=1.0)
        y_ND = y_ND.float()
        self.xx = _with_product(self.xx, x_ND, x_ND)
        self.xy = _with_product(self.xy, x_ND, y_ND)
        self.yy += float(y_ND.square().sum(dtype=torch.float64))

    def __add__(self, other: Moments) -> Moments:
        both = Moments()
        parts = [m for m in (self, other) if m.xx is not None and m.xy is not None]
        for m in parts:
            both.xx, both.xy = _sum_to(both.xx, m.xx), _sum_to(both.xy, m.xy)  # type: ignore[arg-type]
            both.yy += m.yy
        return both

    def _of_inputs(self, width: int) -> tuple[Tensor, Tensor]:
        """X'X and X'Y of the first `width` columns of X."""
        assert self.xx is not None and self.xy is not None, "no calibration tokens were seen"
        return self.xx[:width, :width], self.xy[:width]

    def least_squares(self, bias: bool = False, damping: float = DAMPINGS[0]) -> Tensor:
        """The weight `[hidden_size, hidden_size]` that predicts Y from X best, in float64, by least squares with a ridge of `damping`.

        With `bias`, it has the bias as one more column at the end.
        """
        assert self.xx is not None, "no calibration tokens were seen"
        xx, xy = self._of_inputs(len(self.xx) - (not bias))
        return torch.linalg.solve(with_ridge(xx, damping), xy).T

    def relative_error(self, weight_OI: Tensor) -> float:
        """||Y - X W'||^2 / ||Y||^2 of a linear map W, from the moments alone. 0 is exact; 1 is no better than predicting zero.

        `weight_OI` is `[hidden_size, hidden_size]`, or with a bias as one more column at the end.
        """
        weight = weight_OI.double()
        xx, xy = self._of_inputs(weight.shape[1])
        squared = self.yy - 2 * (weight.T * xy).sum() + ((weight @ xx) * weight).sum()
        return float(squared) / max(self.yy, 1e-30)


class Statistics:
    """Statistics of one parent layer: moments of both subblocks, and of their inner activations.

    `needs` names what to gather; every variant says what it needs (see `puzzle_ray.variants.base.needed_statistics`).

    - `inputs`: `halves` and `moments`, see `Moments`. The first half of the tokens of every batch goes to the first moments of
      `halves`, the other half to the second. So what is fitted on one half can be judged on the other.
    - `heads`: `head_moment`, the second moment of the input of the attention's output projection,
      `[num_attention_heads * head_dim, num_attention_heads * head_dim]` in float64; of either half of the tokens in `head_halves`.
    - `channels`: `channel_moment`, the second moment of the input of the FFN's down projection,
      `[intermediate_size, intermediate_size]` in float64; of either half of the tokens in `channel_halves`.

    `channel_mean_F`, `[intermediate_size]`, is always gathered. `tokens` is the number of tokens seen.
    """

    def __init__(self, needs: Iterable[str] = ALL_STATISTICS) -> None:
        self.needs = frozenset(needs)
        self.halves: dict[SubblockKind, tuple[Moments, Moments]] = {kind: (Moments(), Moments()) for kind in KINDS}
        self.channel_sum: Tensor | None = None
        self.head_halves: list[Tensor | None] = [None, None]
        self.channel_halves: list[Tensor | None] = [None, None]
        self.tokens = 0

    @property
    def head_moment(self) -> Tensor | None:
        """Over all tokens; None where none were seen, or heads are not needed."""
        return _whole(self.head_halves)

    @property
    def channel_moment(self) -> Tensor | None:
        """Over all tokens; None where none were seen, or channels are not needed."""
        return _whole(self.channel_halves)

    @property
    def moments(self) -> dict[SubblockKind, Moments]:
        """The moments of every subblock over all tokens."""
        return {kind: first + second for kind, (first, second) in self.halves.items()}

    @property
    def channel_mean_F(self) -> Tensor:
        """Mean |X_i| over tokens for every FFN channel i, `[intermediate_size]` in float64."""
        assert self.channel_sum is not None, "no calibration tokens were seen"
        return self.channel_sum / max(1, self.tokens)

    def _add_channels(self, x_NF: Tensor) -> None:
        self.channel_sum = _sum_to(self.channel_sum, x_NF.abs().sum(dim=0, dtype=torch.float64))
        self.tokens += len(x_NF)
        if CHANNELS in self.needs:
            _add_halves(self.channel_halves, x_NF)

    def _add_heads(self, x_NF: Tensor) -> None:
        if HEADS in self.needs:
            _add_halves(self.head_halves, x_NF)

    def _add_subblock(self, kind: SubblockKind, x_ND: Tensor, y_ND: Tensor) -> None:
        if INPUTS in self.needs:
            for moments, part in zip(self.halves[kind], _halves_of(len(x_ND)), strict=True):
                moments.add(x_ND[part], y_ND[part])

    @contextmanager
    def watch(self, layer: nn.Module, descriptor: Descriptor) -> Iterator[None]:
        """While the context is open, every forward of `layer` adds to the statistics."""
        handles = []

        def rows(hidden_states: Tensor) -> Tensor:
            return hidden_states.detach().flatten(0, -2)

        def watch_input(module: nn.Module, add: Any) -> None:
            handles.append(module.register_forward_pre_hook(lambda _, args: add(rows(args[0]))))

        def watch_subblock(kind: SubblockKind) -> None:
            entered: list[Tensor] = []

            def on_entry(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
                entered.append(rows(args[0] if args else kwargs["hidden_states"]))

            def on_exit(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
                self._add_subblock(kind, entered.pop(), rows(output[0] if isinstance(output, tuple) else output))

            entry = layer.get_submodule(descriptor.entry(kind))
            handles.append(entry.register_forward_pre_hook(on_entry, with_kwargs=True))
            handles.append(layer.get_submodule(descriptor.module(kind)).register_forward_hook(on_exit))

        for kind in KINDS:
            if isinstance(layer.get_submodule(descriptor.module(kind)), REPLACED):
                continue  # a child's own: what can still replace it starts from no statistics
            if kind == "ffn":
                watch_input(getattr(descriptor.core(layer, kind), descriptor.ffn_down), self._add_channels)
            else:
                watch_input(getattr(descriptor.core(layer, kind), descriptor.output), self._add_heads)
            watch_subblock(kind)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _halves_of(tokens: int) -> tuple[slice, slice]:
    middle = (tokens + 1) // 2
    return slice(0, middle), slice(middle, None)


def _add_halves(halves: list[Tensor | None], x_NF: Tensor) -> None:
    for number, part in enumerate(_halves_of(len(x_NF))):
        own = x_NF[part].float()
        halves[number] = _with_product(halves[number], own, own)


def _whole(halves: Sequence[Tensor | None]) -> Tensor | None:
    first, second = halves
    return first if second is None else _sum_to(first, second)


def refit(weight_OI: Tensor, moment: Tensor, kept: Tensor, damping: float = 1e-4) -> Tensor:
    """The weight `[out, kept]` on some inputs of a projection that comes closest to the whole weight `[out, in]` on all inputs.

    `moment` is the second moment M of the inputs, `[in, in]`; `kept` are the indices of the inputs that remain. The result is the
    least-squares solution W_kept + W_gone M_gone,kept M_kept,kept^-1, with a ridge of `damping` in the inverse. It is in float64.
    """
    weight = weight_OI.double()
    gone = torch.ones(len(moment), dtype=torch.bool, device=moment.device)
    gone[kept] = False
    cross = weight[:, gone] @ moment[gone][:, kept]
    return weight[:, kept] + torch.linalg.solve(with_ridge(moment[kept][:, kept], damping), cross.T).T


def refit_error(weight_OI: Tensor, moment: Tensor, kept: Tensor, fitted: Tensor) -> float:
    """||W x - W' x_kept||^2 / ||W x||^2 of a refitted weight W', `[out, kept]`, on inputs x of second moment `moment`."""
    weight = weight_OI.double()
    missed = weight.clone()
    missed[:, kept] -= fitted
    squared, whole = (((w @ moment) * w).sum() for w in (missed, weight))
    return float(squared) / max(float(whole), 1e-30)


def refit_well(weight_OI: Tensor, halves: Sequence[Tensor | None], kept: Tensor) -> tuple[Tensor, float]:
    """(`refit` on all tokens, its damping): the largest that does well on the half of the tokens that it was not fitted on."""
    seen, unseen = halves
    assert seen is not None and unseen is not None, "no calibration tokens were seen"

    def error_of(damping: float) -> float:
        return refit_error(weight_OI, unseen, kept, refit(weight_OI, seen, kept, damping))

    damping, _ = largest_damping(error_of)
    return refit(weight_OI, seen + unseen, kept, damping), damping

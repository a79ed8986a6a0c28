"""`gqa_prune:N`: attention with the N most important key-value heads. The others are removed.

The importance of a KV head is the mean over calibration tokens of ||sum over its query heads of W_o z||^2, where z is the output of a
query head. It is what the KV head and its query heads add to the residual stream.

Query heads are reordered, so that those of a kept KV head stay with it. The number of query heads does not change, so every kept KV
head also serves the query heads of some removed ones. The columns of the output projection for these start at zero. The columns for
the other query heads are fitted by least squares on the same tokens, so that they come closest to the output of all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puzzle_ray.artifacts import SubblockKind
from puzzle_ray.calibration import HEADS, Statistics, refit_well
from puzzle_ray.families.descriptor import Descriptor
from puzzle_ray.surgery.projections import AttentionProjections, copy_checked
from puzzle_ray.variants.gqa import GroupedQueryAttention


def importance_K(attention: AttentionProjections, head_moment: Tensor) -> Tensor:
    """The importance of every KV head: trace(W M W'), `[num_key_value_heads]`.

    W are the columns of W_o for the KV head's query heads. M is the second moment of the input of W_o, `head_moment`, for the same
    columns.
    """
    width = attention.num_heads // attention.num_kv_heads * attention.head_dim
    weight = attention.output.weight_OI.double()
    starts = range(0, weight.shape[1], width)
    blocks = [(weight[:, s : s + width], head_moment[s : s + width, s : s + width]) for s in starts]
    return torch.stack([((w @ m) * w).sum() for w, m in blocks])


class PrunedHeads(GroupedQueryAttention):
    name = "gqa_prune"
    needs = (HEADS,)

    @torch.no_grad()
    def initialise(
        self,
        layer: nn.Module,
        parent: nn.Module,
        argument: str,
        kind: SubblockKind,
        descriptor: Descriptor,
        statistics: Statistics,
    ) -> str:
        moment = statistics.head_moment
        assert moment is not None, "no calibration tokens were seen"
        old, new = AttentionProjections.of(parent, descriptor), AttentionProjections.of(layer, descriptor)
        heads, whole = int(argument), old.num_kv_heads
        kept = importance_K(old, moment).topk(heads).indices.sort().values
        gone = torch.tensor([h for h in range(whole) if h not in set(kept.tolist())], device=kept.device)
        order = torch.cat([kept[:, None], gone.reshape(heads, -1)], dim=1)  # of the parent's KV heads, by their new head

        def rows_of(kv_heads: Tensor, width: int) -> Tensor:
            return (kv_heads[:, None] * width + torch.arange(width, device=kept.device)).flatten()

        width = old.num_heads // whole * old.head_dim  # of all query heads of one KV head
        query_rows, key_rows = rows_of(order.flatten(), width), rows_of(kept, old.head_dim)
        new.query.write_rows(old.query, query_rows)
        new.key.write_rows(old.key, key_rows)
        new.value.write_rows(old.value, key_rows)
        output = torch.zeros_like(old.output.weight_OI)
        here = rows_of(torch.arange(heads, device=kept.device) * (whole // heads), width)
        fitted, damping = refit_well(old.output.weight_OI, statistics.head_halves, query_rows[here])
        output[:, here] = fitted.to(output.dtype)
        new.output.write(output, old.output.bias_O)
        for names, rows in ((descriptor.query_norms, query_rows), (descriptor.key_norms, key_rows)):
            for name in names:
                norms = [getattr(descriptor.core(x, "attention"), name) for x in (parent, layer)]
                copy_checked(norms[1].weight, norms[0].weight[rows])
        return f"kept heads {', '.join(str(h) for h in kept.tolist())} (damping {damping:g})"


VARIANT = PrunedHeads()

"""KV heads of attention variants, counted by the bytes that a profile has of them."""

from __future__ import annotations

from puzzle_ray.artifacts import PARENT, Profile, ProfileRow

KV_HEADS = "kv_heads"
_ALL_HEADS = "window"  # the variant that keeps every head, of fewer tokens


def kv_head_bytes(profile: Profile, layer_type: str, batch_size: int) -> float:
    """Bytes that one KV head keeps per token, taken from any profiled `gqa:N` of that layer type. 0 where there is none."""
    for row in profile.rows:
        name, _, count = row.variant.partition(":")
        if (row.layer_type, row.batch_size, name) == (layer_type, batch_size, "gqa") and count.isdigit():
            return row.kv_bytes_per_token / int(count)
    return 0.0


def kv_heads_of(row: ProfileRow, profile: Profile, head_bytes: float) -> int:
    """The KV heads of an attention variant. A window has all of the original's, however few tokens they keep."""
    counted = row
    if row.variant.partition(":")[0] == _ALL_HEADS:
        counted = profile.row(row.layer_type, "attention", PARENT, row.batch_size)
    return round(counted.kv_bytes_per_token / head_bytes)

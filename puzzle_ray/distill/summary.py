"""What is said of a finished global distillation, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def gkd_summary(facts: Mapping[str, Any]) -> str:
    """One line about a finished distillation, from the facts of its artifact; empty where it was not watched."""
    if "kept" not in facts:
        return ""
    before, after = facts["heldout_kl_before"], facts["heldout_kl"]
    if facts["kept"] == "start":
        words = f"distillation did not improve the child (held-out KL {before:.4g}): it is published as it was"
    else:
        words = f"held-out KL {before:.4g} -> {after:.4g}, weights of {facts['kept']}"
    went_back = facts["returns"]
    if went_back:
        words += (
            f"; the KL rose above the start's {went_back} time{'s' * (went_back != 1)}, each with half the learning rate after it"
        )
    if "ended_after" in facts:
        words += f"; it ended after step {facts['ended_after']} of {facts['steps']}"
    if facts.get("range_test"):
        words += f"; learning rate {facts['learning_rate']:g}, the best of {len(facts['range_test'])} in a range test"
    elif facts["kept"] == "start" and went_back:
        words += "; lower gkd.learning_rate, or set it to auto"
    return words

"""What is said of a finished global distillation, in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from puzzle_ray.distill.guard import MAX_RETURNS


def gkd_summary(facts: Mapping[str, Any]) -> str:
    """One line about a finished distillation, from the facts of its artifact; empty where there is nothing to say."""
    return "; ".join([*_watched(facts), *_lm_tokens(facts)])


def _watched(facts: Mapping[str, Any]) -> Iterator[str]:
    """What came of it on held-out text, where it was watched."""
    if "kept" not in facts:
        return
    before, after, kept_start = facts["heldout_kl_before"], facts["heldout_kl"], facts["kept"] == "start"
    if kept_start:
        yield f"distillation did not improve the child (held-out KL {before:.4g}): it is published as it was"
    else:
        yield f"held-out KL {before:.4g} -> {after:.4g}, weights of {facts['kept']}"
    if facts["returns"]:
        yield f"{_why_back(facts)}, {_rate_after(facts['returns'])}"
    if "ended_after" in facts:
        yield f"it ended after step {facts['ended_after']} of {facts['steps']}"
    if facts.get("range_test"):
        yield f"learning rate {facts['learning_rate']:g}, the best of {len(facts['range_test'])} in a range test"
    elif kept_start and facts.get("ended_after") == 0 and facts.get("not_finite"):
        yield "no step was taken, so it is not the learning rate; lower the weights of the losses, or raise gkd.temperature"
    elif kept_start and facts["returns"]:
        yield "lower gkd.learning_rate, or set it to auto"
    elif kept_start:
        yield "the KL was the same at every look, so steps were too small to change its weights in their dtype; raise gkd.learning_rate"


def _why_back(facts: Mapping[str, Any]) -> str:
    """Why training went back, and how often for each reason."""
    broken = facts.get("not_finite", 0)  # earlier versions did not count them
    reasons = {"the KL rose above the start's": facts["returns"] - broken, "loss, gradient or KL was not finite": broken}
    return " and ".join(f"{why} {count} time{'s' * (count != 1)}" for why, count in reasons.items() if count)


def _rate_after(returns: int) -> str:
    """What followed: after the last return that is allowed nothing does."""
    if returns <= MAX_RETURNS:
        return "each with half the learning rate after it"
    return "with half the learning rate after each but the last, which ended it"


def _lm_tokens(facts: Mapping[str, Any]) -> Iterator[str]:
    if facts.get("lm_tokens_found") is False:
        never = "its markers are not in the text, or the parent gives no token so high a probability"
        yield f"gkd.lm_tokens chose no token of the text, so the next-token loss was 0 throughout: {never}"

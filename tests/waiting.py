"""Waiting for what comes true by itself, however busy the machine is, but not for ever."""

import time
from collections.abc import Callable


def until(true: Callable[[], object], what: str, limit_s: float = 240) -> None:
    """Returns as soon as `true()` is. Fails after `limit_s`, saying `what` did not happen."""
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)

"""The errors a user can meet.

    PuzzleError
    |- ConfigError          a setting is wrong
    |- DataError            the text is missing, empty or too short
    |- ParentError          the parent cannot be read or its family is not supported
    |- StoreError           an artifact is missing or cannot be written
    |  `- Damaged           a file of an artifact is not as it was written
    |- ProfileError         a measurement could not be made
    |- Infeasible           no architecture meets the limits
    |- NotFinite            a loss or an activation became NaN or infinite
    |- OutOfOrder           a trainer was handed a micro-batch it has not come to yet
    |- ClusterError         Ray cannot be reached or lacks what was asked for

Every error takes plain values, hands them all to `Exception.__init__` (so that it survives the trip between Ray processes) and
says in one line what was wrong, with which value, and what to write instead.
"""

from __future__ import annotations


class PuzzleError(Exception):
    """Base of all errors that are the user's to mend."""


class ConfigError(PuzzleError):
    """A setting is wrong: `where` (dotted path), `problem`, `remedy`."""

    def __init__(self, where: str, problem: str, remedy: str = "") -> None:
        super().__init__(where, problem, remedy)

    def __str__(self) -> str:
        where, problem, remedy = self.args
        return f"{where}: {problem}" + (f"; {remedy}" if remedy else "")


class DataError(ConfigError):
    """The text is missing, empty or too short."""


class ParentError(ConfigError):
    """The parent cannot be read or its family is not supported."""


class StoreError(ConfigError):
    """An artifact is missing or cannot be written."""


class Damaged(StoreError):
    """A file of an artifact is not as it was written. `where` is the stage that made it."""


class ProfileError(ConfigError):
    """A measurement could not be made."""


class ClusterError(ConfigError):
    """Ray cannot be reached or lacks what was asked for."""


class Infeasible(PuzzleError):
    """No architecture meets `limit` (`sense` is `<=` or `>=`).

    `best` is what the best architecture for that limit alone reaches; where limits clash only together, the best while the others
    hold (`note` says so); for a searcher that proves nothing, what its own best try reached.
    """

    def __init__(self, limit: str, sense: str, asked: float, best: float, unit: str = "", note: str = "") -> None:
        super().__init__(limit, sense, asked, best, unit, note)

    def __str__(self) -> str:
        limit, sense, asked, best, unit, note = self.args
        unit = f" {unit}" if unit else ""
        text = f"no architecture in this search space meets {limit} {sense} {asked:g}{unit}; the best reachable is {best:g}{unit}"
        return text + (f"; {note}" if note else "")


class NotFinite(PuzzleError):
    """A loss or an activation became NaN or infinite."""

    def __init__(self, what: str, layer: int, variant: str, micro_batch: int) -> None:
        super().__init__(what, layer, variant, micro_batch)

    def __str__(self) -> str:
        what, layer, variant, micro_batch = self.args
        return (
            f"{what} is not finite at layer {layer}, variant {variant}, micro-batch {micro_batch}; "
            "lower library.learning_rate, or drop the variant from the search space"
        )


class OutOfOrder(PuzzleError):
    """A trainer was handed micro-batch `got` while the next one it needs is `expected`."""

    def __init__(self, got: int, expected: int) -> None:
        super().__init__(got, expected)

    def __str__(self) -> str:
        got, expected = self.args
        return f"micro-batch {got} came, but {expected} is the next one to train on"

"""The errors that a user can meet.

    PuzzleError
    |- ConfigError          a setting is wrong
    |- DataError            the text is missing, empty or too short
    |- ParentError          the parent cannot be read or its family is not supported
    |- StoreError           an artifact is missing or cannot be written
    |  `- Damaged           a file of an artifact is not as it was written
    |- ProfileError         a measurement could not be made
    |- Infeasible           no architecture meets the limits
    |- NotFinite            a loss or an activation became NaN or infinite
    |- OutOfOrder           a trainer got another micro-batch than the next one
    |- OutOfTime            the search's time limit came before an answer
    |- ClusterError         Ray cannot be reached or lacks what was asked for
    |- PluginError          a user's own variant, searcher or engine raised an error

Every error says in one line what is wrong, with which value, and what to write instead.
Every error takes plain values and passes them all to `Exception.__init__`. So it can be sent between Ray processes.
"""

from __future__ import annotations


class PuzzleError(Exception):
    """The base of all errors that a user can mend."""


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


class OutOfTime(ConfigError):
    """The time limit came before an answer was found. Nothing is known about whether there is one."""


class PluginError(PuzzleError):
    """A user's own variant, searcher or engine raised an error.

    `what` names it, `doing` says in which of its functions, `error` is what it raised, `place` is the file and line. `trace` is the
    traceback, which is for a log.
    """

    def __init__(self, what: str, doing: str, error: str, place: str, trace: str = "") -> None:
        super().__init__(what, doing, error, place, trace)

    def __str__(self) -> str:
        what, doing, error, place, _ = self.args
        return f"{what} failed in {doing}: {error} ({place})"


class Infeasible(PuzzleError):
    """No architecture meets `limit`. `sense` is `<=` or `>=`, and `asked` is the limit's value.

    `best` is the best value that any architecture reaches. Where limits can be met alone, but not together, it is the best value while
    the other limits hold. For a searcher that proves nothing, it is the value of its best try. `note` says which.
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
        remedy = "lower library.learning_rate, or drop the variant from the search space"
        if variant == "parent":
            remedy = "set library.parent_dtype and library.activation_dtype to float32, or take another checkpoint"
        return f"{what} is not finite at layer {layer}, variant {variant}, micro-batch {micro_batch}; {remedy}"


class OutOfOrder(PuzzleError):
    """A trainer got micro-batch `got`, while the next one is `expected`."""

    def __init__(self, got: int, expected: int) -> None:
        super().__init__(got, expected)

    def __str__(self) -> str:
        got, expected = self.args
        return f"micro-batch {got} came, but {expected} is the next one to train on"

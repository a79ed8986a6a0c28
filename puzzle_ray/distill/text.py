"""Which tokens every position of block distillation reads, and whether there are enough for both distillations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from puzzle_ray.data.order import Tokens, epochs, told_if_read_again
from puzzle_ray.data.packing import positions_in_documents
from puzzle_ray.distill.curriculum import Curriculum
from puzzle_ray.distill.schedule import Schedule
from puzzle_ray.distill.settings import GkdConfig, LibraryConfig


@dataclass(frozen=True)
class LibraryText:
    """Training text in two parts: validation sequences, which no variant is ever trained on, and the others.

    A function of (seed, position) alone, so that a run that is resumed reads on where it was.
    """

    validation: Tokens
    training: Tokens
    schedule: Schedule
    seed: int
    sequences: int  # of a micro-batch

    @classmethod
    def of(cls, tokens: Tokens, seed: int, config: LibraryConfig) -> LibraryText:
        """Raises DataError where validation would leave nothing to train on."""
        schedule, sequences = Schedule.of(config), config.micro_batch_tokens // tokens.sequences.shape[1]
        validation, training = tokens.split_validation(seed, schedule.validate * sequences)
        return cls(validation, training, schedule, seed, sequences)

    def batch(self, position: int) -> Tensor:
        """The token ids of a position, `[sequences, sequence_length]`. Both validations read the same ones."""
        phase, number = self.schedule.phase(position)
        if phase.startswith("validate"):
            return self.validation.batch(self.seed, number, self.sequences)
        return self.training.batch(self.seed, self.schedule.data_number(position) - self.schedule.validate, self.sequences)

    def position_ids(self, input_ids: Tensor) -> Tensor | None:
        """Where the documents of a batch begin, see `puzzle_ray.data.packing`; None where attention crosses them."""
        return positions_in_documents(input_ids, self.training.separator)

    @property
    def epochs(self) -> float:
        """How often the training text is read; above 1 some of it is read again."""
        micro_batches = self.schedule.calibrate + self.schedule.train
        return epochs(micro_batches * self.sequences, self.training.num_sequences)

    def say_epochs(self) -> None:
        """Where some of the text is read again."""
        told_if_read_again("library", self.epochs, self.training.num_tokens)


def check_enough(tokens: Tokens, seed: int, library: LibraryConfig, gkd: GkdConfig) -> None:
    """Raises DataError where validation of blocks would leave nothing to train on, ConfigError where a stage of global distillation has
    sequences that are longer than the text."""
    LibraryText.of(tokens, seed, library)
    Curriculum.of(tokens, gkd, seed)

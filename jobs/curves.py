"""Training curves for TensorBoard: `tensorboard --logdir STORE/log`. What is trained live as it goes, every variant's when it is done."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle_ray.run_log import RunLog

if TYPE_CHECKING:
    from puzzle_ray.store import Artifact

FOLDER = "tensorboard"
POINTS = 200  # of a curve that is written when it is known as a whole


class Curves:
    """Writes scalars of one run beside its log. Nothing is made before the first."""

    def __init__(self, log: RunLog) -> None:
        self.log = log
        self.writer: Any = None
        self.scratch: Path | None = None

    def add(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """One point of every value's curve."""
        for what, value in values.items():
            self._opened().add_scalar(f"{name}/{what}", float(value), step)

    def add_library(self, artifact: Artifact) -> None:
        """The loss of every variant of a finished library."""
        from puzzle_ray.distill.library import Library

        for (layer, kind, variant), losses in Library(artifact).curves().items():
            tag = f"variants/layer {layer:03d}/{kind} {variant}".replace(":", "_")
            for step, loss in thinned(losses):
                self._opened().add_scalar(tag, loss, step)

    def add_gkd(self, artifact: Artifact) -> None:
        """The losses of a finished global distillation."""
        from puzzle_ray.distill.gkd import CURVE
        from puzzle_ray.distill.gkd_trainer import GkdRow
        from puzzle_ray.rows import rows_from_parquet

        rows, _ = rows_from_parquet(artifact.read(CURVE), GkdRow)
        for _, row in thinned(rows):
            for name in ("loss", "kl", "cosine", "lm"):
                self._opened().add_scalar(f"gkd {artifact.key}/{name}", getattr(row, name), row.step)

    def flush(self) -> None:
        """What was added can be read."""
        if self.writer is not None:
            self.writer.flush()
            if self.scratch is not None:
                self.log.put_folder(self.scratch, FOLDER)

    def close(self) -> None:
        if self.writer is not None:
            self.flush()
            self.writer.close()
            self.writer = None
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _opened(self) -> Any:
        if self.writer is None:
            from tensorboardX import SummaryWriter

            if not self.log.store.is_local:
                self.scratch = Path(tempfile.mkdtemp(prefix="puzzle-ray-curves-"))
            self.writer = SummaryWriter(str(self.scratch or f"{self.log.url}/{FOLDER}"), flush_secs=10)
        return self.writer


def thinned(values: Sequence[Any]) -> list[tuple[int, Any]]:
    """(position, value) of at most `POINTS` values, evenly spread, the last among them."""
    count = len(values)
    if count <= POINTS:
        return list(enumerate(values))
    return [(i, values[i]) for i in (round(n * (count - 1) / (POINTS - 1)) for n in range(POINTS))]

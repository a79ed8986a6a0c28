"""The block library: its files, the trainers of a group of layers, and the whole stage in one process.

A file holds the weights of one variant, or of both halves of a coupled pair, by `<kind>/<name inside the layer>`. Its tensor `curve`
is the training loss of every optimizer step, in float64. Its header has the row alone: a header ends at 100 MB.
"""

from __future__ import annotations

import io
import json
from array import array
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from puzzle_ray.artifacts import BLOCK, LayerChoice, SearchSpace, SubblockKind
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.bld import LayerTrainer, LibraryRow, Schedule
from puzzle_ray.distill.candidate import states_by_kind
from puzzle_ray.distill.library_checkpoints import LibraryCheckpoints, variant_file
from puzzle_ray.distill.outliers import stands_out
from puzzle_ray.distill.rate_trials import RateTrial
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.distill.text import LibraryText
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.blocks import CPU, load_stack
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.process import compute_with, give_back_freed_memory
from puzzle_ray.progress import Progress
from puzzle_ray.rows import rows_from_parquet, rows_to_parquet
from puzzle_ray.store import RECORD, Artifact, Store
from puzzle_ray.store.record import OTHER_VERSION

LIBRARY_TABLE = "library.parquet"
CURVES_TABLE = "curves.parquet"  # layer, kind, variant, losses; one row group per variant
TRIALS_TABLE = "learning_rates.parquet"  # where they were found, every trial of every variant
TRIALS = "trials"  # in the header of a variant's file
CURVE = "curve"  # the tensor of a variant's file that is no weight
Entry = tuple[int, str, str]  # layer, kind, variant
Part = tuple[int, int]  # number of a part, how many there are
WHOLE: Part = (0, 1)


def unfinished_layers(space: SearchSpace, artifact: Artifact) -> list[int]:
    """Layers that have an entry whose file does not exist yet."""
    existing = set(artifact.names())
    return sorted({entry[0] for entry in space.entries() if variant_file(*entry) not in existing})


def carry_over(earlier: Artifact, layers: Collection[int], space: SearchSpace, artifact: Artifact) -> None:
    """Takes the entries of some layers from an earlier library as they are, so that they are not trained again."""
    existing = set(artifact.names())
    for entry in space.entries():
        name = variant_file(*entry)
        if entry[0] in layers and name not in existing:
            artifact.write(name, earlier.read(name))


class GroupTrainer:
    """The trainers of some layers. It saves their checkpoints and publishes what is finished. It needs no Ray.

    With `part` (n, k) it trains every k-th variant of each layer from number n on; other trainers have the others. Variants stand by kind
    and size, so every part has some of each.
    """

    def __init__(
        self,
        parent: str,
        layers: Sequence[int],
        space: SearchSpace,
        config: LibraryConfig,
        artifact: Artifact,
        num_threads: int,
        device: torch.device = CPU,
        part: Part = WHOLE,
    ) -> None:
        compute_with(num_threads)
        folder = locate(parent)
        model_config = read_config(folder)
        descriptor = describe(model_config)
        self.artifact, self.config = artifact, config
        self.schedule = Schedule.of(config)
        existing = set(artifact.names())  # a process that is started again may have finished some of its variants
        starts = starting_library(config, space)
        self.checkpoints = LibraryCheckpoints(artifact, config)
        self.trainers = []
        for index in layers:
            layer, own = space.layers[index], space.layers[index].trained[part[0] :: part[1]]
            choices = [choice for choice in own if variant_file(index, *layer.entry(choice)) not in existing]
            if not choices:
                continue
            stack = load_stack(folder, descriptor, model_config, index, index + 1, torch.float32, ends=False, device=device)
            trainer = LayerTrainer(index, stack, layer, config, starts.states if starts else None, choices)
            self.checkpoints.restore(trainer)
            self.trainers.append(trainer)
        give_back_freed_memory()

    @property
    def last(self) -> int:
        """The last position that every layer of this group has done."""
        return min((trainer.position for trainer in self.trainers), default=self.schedule.positions - 1)

    def step(self, position: int, hidden_states: Mapping[int, Tensor], position_ids: Tensor | None = None) -> float | None:
        """Does one position for every layer. Returns the mean training loss, or None where no optimizer step was finished.

        `hidden_states[i]` is the input of layer i and `hidden_states[i + 1]` its output, each `[batch, tokens, hidden_size]`;
        `position_ids` are as of `LayerTrainer.step`.
        """
        losses = []
        for trainer in self.trainers:
            own = hidden_states[trainer.index], hidden_states[trainer.index + 1]
            loss = trainer.step(position, *own, position_ids)
            if loss is not None:
                losses.append(loss)
            if trainer.finished:
                self._publish(trainer)
        if self.schedule.phase(position)[1] == 0:  # what a phase's first position has made stays, among what it has freed
            give_back_freed_memory()
        self.checkpoints.after(position, self.trainers)
        return sum(losses) / len(losses) if losses else None

    def save(self) -> None:
        """Writes a checkpoint of every variant that is not finished."""
        self.checkpoints.save(self.trainers)

    def _publish(self, trainer: LayerTrainer) -> None:
        self.checkpoints.settle()
        for row, state, curve in trainer.results():
            name = variant_file(row.layer, row.kind, row.variant)
            if not self.artifact.exists(name):
                tensors = {**state, CURVE: torch.tensor(curve, dtype=torch.float64)}
                about, tried = {"row": json.dumps(asdict(row))}, trainer.tried(row.kind, row.variant)
                about |= {TRIALS: json.dumps([asdict(trial) for trial in tried])} if tried else {}
                self.artifact.write_tensors(name, tensors, about)
            self.checkpoints.forget(row.layer, row.kind, row.variant)


@dataclass(frozen=True)
class Library:
    """A finished block library in the store."""

    artifact: Artifact

    def rows(self) -> tuple[LibraryRow, ...]:
        rows, _ = rows_from_parquet(self.artifact.read(LIBRARY_TABLE), LibraryRow)
        return rows

    def curves(self) -> dict[Entry, array[float]]:
        """(layer, kind, variant) -> the training loss of every optimizer step."""
        import pyarrow.parquet as pq

        file, curves = pq.ParquetFile(io.BytesIO(self.artifact.read(CURVES_TABLE))), {}
        for batch in file.iter_batches(batch_size=1):
            (layer,), (kind,), (variant,) = (batch[name].to_pylist() for name in ("layer", "kind", "variant"))
            curves[layer, kind, variant] = array("d", batch["losses"].flatten().to_numpy().tobytes())
        return curves

    @cached_property
    def coupled(self) -> bool:
        """Whether pairs were trained together. The weights of a half then differ from pair to pair."""
        return bool(self.artifact.facts()["coupled"])

    def states(self, layer: int, choice: LayerChoice) -> dict[SubblockKind, dict[str, Tensor]]:
        """The weights of the subblocks that a choice replaces. A coupled library has weights of its own for every pair."""
        entries = [(kind, choice.variant(kind)) for kind in choice.replaced]
        if self.coupled and entries:
            files = [variant_file(layer, BLOCK, choice.label)]
        else:
            files = [variant_file(layer, kind, variant) for kind, variant in entries]
        tensors = (item for file in files for item in self.artifact.read_tensors(file)[0].items())
        weights = {name: value for name, value in tensors if name != CURVE}
        return {kind: states_by_kind(weights).get(kind, {}) for kind in choice.replaced}


def starting_library(config: LibraryConfig, space: SearchSpace, parent_key: str | None = None) -> Library | None:
    """The library that `start_from` names, or None where it names none.

    Raises ConfigError where it is no finished decoupled library, where it lacks a half of `space`, or where it was made for another
    parent than `parent_key`.
    """
    if config.start_from is None:
        return None
    root, _, folder = config.start_from.rstrip("/").rpartition("/")
    stage, _, key = folder.rpartition("-")
    artifact = Artifact(Store(root or "."), stage, key, {}, {})
    where, remedy = "library.start_from", "name the folder library-... of a decoupled run in its store"
    try:
        finished = stage == "library" and artifact.finished
        problem = artifact.record_problem()
    except Exception as error:  # every backend has errors of its own
        raise ConfigError(where, f"{config.start_from!r} cannot be read ({error})", remedy) from None
    if problem.startswith(OTHER_VERSION):
        raise ConfigError(where, f"{config.start_from!r} {problem}", "train it again")
    if not finished:
        raise ConfigError(where, f"{config.start_from!r} is no finished library", remedy)
    if "coupled" not in artifact.facts():
        raise ConfigError(where, f"{config.start_from!r} was made by an older version", "train it again")
    library, existing = Library(artifact), set(artifact.names())
    if library.coupled:
        raise ConfigError(where, f"{config.start_from!r} holds coupled pairs, whose halves do not stand for themselves", remedy)
    for layer, kind, variant in space.subblocks():
        if variant_file(layer, kind, variant) not in existing:
            raise ConfigError(
                where, f"{config.start_from!r} has no {variant} for layer {layer}", "narrow the space, or name another"
            )
    made_for = artifact.read_json(RECORD)["inputs"].get("parent")
    if parent_key is not None and made_for != parent_key:
        raise ConfigError(where, f"{config.start_from!r} was made for another parent", "name a library of this one")
    return library


def finish_library(space: SearchSpace, artifact: Artifact) -> Library:
    """Gathers the row and the curve of every published variant into tables, and finishes the artifact."""
    rows, curves, trials = [], {}, []
    for entry in space.entries():
        row, curves[entry], tried = _what_happened(artifact, variant_file(*entry))
        rows.append(row)
        trials += tried
    artifact.write(LIBRARY_TABLE, rows_to_parquet(rows, LibraryRow, {}))
    artifact.write(CURVES_TABLE, _curves_table(curves))
    if trials:
        artifact.write(TRIALS_TABLE, rows_to_parquet(trials, RateTrial, {}))
    taken = Counter(trial.rate for trial in trials if trial.taken)
    trained = [row for row in rows if row.kept == "trained"]
    artifact.finish(
        {
            "variants": len(rows),
            "trained": len(trained),
            "coupled": any(layer.coupled for layer in space.layers),
            "tokens": sum(row.tokens for row in rows),
            "tokens_saved": sum(row.tokens_saved for row in rows),
            "stopped_early": sum(row.tokens_saved > 0 for row in rows),
            "went_back": sum(row.returns > 0 for row in rows),
            "failures": [asdict(row) for row in rows if row.failure],
            **({"learning_rates": {f"{rate:g}": taken[rate] for rate in sorted(taken)}} if trials else {}),
            "standing_out": [
                f"layer {row.layer} {row.kind} {row.variant}: {words}" for row in rows if (words := stands_out(row))
            ],
        }
    )
    return Library(artifact)


def library_summary(facts: Mapping[str, Any]) -> str:
    """One line about a finished library, from the facts of its artifact."""
    words = [f"{facts['variants']} {'pairs' if facts['coupled'] else 'variants'}, {facts['trained']} better than their start"]
    if found := facts.get("learning_rates"):
        words.append("learning rates: " + ", ".join(f"{rate} for {count}" for rate, count in found.items()))
    if facts["stopped_early"]:
        share = facts["tokens_saved"] / (facts["tokens"] + facts["tokens_saved"])
        words.append(f"{facts['stopped_early']} stopped early, which spared {share:.0%} of the training tokens")
    if facts["went_back"]:
        words.append(f"{facts['went_back']} went back to their start and on with half the learning rate, since their loss rose")
    if facts["standing_out"]:
        count, first = len(facts["standing_out"]), facts["standing_out"][0]
        words.append(f"warning: {count} {'is' if count == 1 else 'are'} less well-conditioned than the parent ({first})")
    if facts["failures"]:
        words.append(f"{len(facts['failures'])} failed: {facts['failures'][0]['failure']}")
    return "; ".join(words)


def _what_happened(artifact: Artifact, name: str) -> tuple[LibraryRow, array[float], list[RateTrial]]:
    """What the file of a variant says about its training: its row, its loss curve, its trials. Its weights are not read."""
    with artifact.store.filesystem.open(artifact.path(name), "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
        first, last = header[CURVE]["data_offsets"]
        file.seek(8 + size + first)
        curve = array("d", file.read(last - first))
    about = header["__metadata__"]
    return LibraryRow(**json.loads(about["row"])), curve, [RateTrial(**trial) for trial in json.loads(about.get(TRIALS, "[]"))]


def _curves_table(curves: Mapping[Entry, array[float]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [("layer", pa.int64()), ("kind", pa.string()), ("variant", pa.string()), ("losses", pa.list_(pa.float64()))]
    schema, sink = pa.schema(columns), io.BytesIO()
    with pq.ParquetWriter(sink, schema) as writer:
        for (layer, kind, variant), losses in curves.items():
            values = pa.Array.from_buffers(pa.float64(), len(losses), [None, pa.py_buffer(losses)])
            whole = pa.ListArray.from_arrays(pa.array([0, len(losses)], pa.int32()), values)
            writer.write_table(pa.table([[layer], [kind], [variant], whole], schema=schema))
    return sink.getvalue()


class SerialLibrary:
    """The library stage in this process, without Ray: the parent's layers, and the trainers of the unfinished ones."""

    def __init__(
        self,
        parent: str,
        space: SearchSpace,
        config: LibraryConfig,
        tokens: Tokens,
        seed: int,
        artifact: Artifact,
        num_threads: int = 1,
        device: torch.device = CPU,
    ) -> None:
        """`artifact` must have an unfinished layer."""
        layers = unfinished_layers(space, artifact)
        self.group = GroupTrainer(parent, layers, space, config, artifact, num_threads, device)
        folder = locate(parent)
        model_config = read_config(folder)
        dtype = getattr(torch, config.parent_dtype)
        self.stack = load_stack(folder, describe(model_config), model_config, 0, max(layers) + 1, dtype, device=device)
        self.schedule = Schedule.of(config)
        self.text = LibraryText.of(tokens, seed, config)
        self.activation_dtype = getattr(torch, config.activation_dtype)

    def batch(self, position: int) -> Tensor:
        """The token ids of a position, `[sequences, tokens]`."""
        return self.text.batch(position).to(self.stack.device)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> dict[int, Tensor]:
        """The input of every layer by its index, and behind the last layer its output: `[sequences, tokens, hidden_size]`.

        They are rounded to `activation_dtype`, as they are on a cluster, where they go through the object store.
        """
        dtype = self.activation_dtype
        hidden = {0: self.stack.embed(input_ids, position_ids).to(dtype)}
        for index in range(self.stack.last):
            entering = hidden[index].to(self.stack.dtype)
            layer = self.stack.layer(index)
            hidden[index + 1] = self.stack.run_layer(layer, index, entering, position_ids=position_ids).to(dtype)
        return {index: state.float() for index, state in hidden.items()}

    def step(self, position: int) -> float | None:
        """Runs one micro-batch through the parent and all trainers. Returns the mean training loss, or None where no step was finished."""
        ids = self.batch(position)
        position_ids = self.text.position_ids(ids)
        return self.group.step(position, self.forward(ids, position_ids), position_ids)


def build_serially(
    parent: str,
    space: SearchSpace,
    config: LibraryConfig,
    tokens: Tokens,
    seed: int,
    artifact: Artifact,
    progress: Progress,
    num_threads: int = 1,
    device: torch.device = CPU,
) -> Library:
    """The library stage in this process, without Ray.

    It gives the same bits as a cluster does with the same number of threads per trainer.
    """
    config = config.for_parent(read_config(locate(parent)))
    if unfinished_layers(space, artifact):
        stage = SerialLibrary(parent, space, config, tokens, seed, artifact, num_threads, device)
        stage.text.say_epochs()
        with progress.stage("library", stage.schedule.positions, "micro-batch") as bar:
            bar.advance(stage.group.last + 1)
            for position in range(stage.group.last + 1, stage.schedule.positions):
                loss = stage.step(position)
                bar.advance(1, **({} if loss is None else {"loss": loss}))
    return finish_library(space, artifact)

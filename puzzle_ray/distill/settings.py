"""Settings of both distillations: of blocks (BLD) and of whole children (GKD)."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from puzzle_ray.families.registry import ffn_width
from puzzle_ray.settings import Count, DType, Fraction, NonNegative, Positive, Section

AUTO: Literal["auto"] = "auto"
REDUCTION = 3  # each rung of a distillation has this many times the tokens of the one below, see `puzzle_ray.distill.rungs`


def rung_steps(total_steps: int, every_steps: int, rungs: int) -> list[int]:
    """The steps that the rungs are at: the last one is the end, and the others are rounded up to the next look at held-out text."""
    wanted = (math.ceil(total_steps / REDUCTION**below) for below in reversed(range(rungs)))
    return sorted({min(total_steps, math.ceil(step / every_steps) * every_steps) for step in wanted})


def _number(given: Any, above: float) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given) and given > above


class BlockLoss(Section):
    """Weights of the terms that a block variant minimises; each is 0 for a perfect copy of the parent.

    `block`: normalised MSE of the layer's output (paper v5, section 3.2). `subblock`: normalised MSE of what each replaced subblock
    adds to the residual stream. `cosine`: cosine distance of the layer's output, a mean over tokens. A token of small norm hardly
    counts in the MSE, but in the cosine distance it counts as much as any other, as it does behind a norm. The paper's loss has
    `cosine` 0; `benchmarks.bld_variants` compares the two.
    """

    block: NonNegative = 1.0
    subblock: NonNegative = 0.0
    cosine: NonNegative = 1.0

    @model_validator(mode="after")
    def _some_term(self) -> BlockLoss:
        if self.block + self.subblock + self.cosine == 0:
            raise ValueError("all loss weights are 0; set library.loss.block, library.loss.subblock or library.loss.cosine")
        return self


class EarlyStop(Section):
    """When a variant's training ends early: see `puzzle_ray.distill.schedule.is_flat`. Windows are counted from the end of warm-up."""

    min_improvement: Fraction = 0.01  # of the mean loss of a window
    window: Count = 32  # optimizer steps
    patience: Count = 2  # windows without improvement


def _rate_or_auto(given: Any) -> Any:
    """A learning rate as it is given, if it is one."""
    if given == AUTO:
        return given
    with suppress(ValueError):  # YAML reads 1e-4 as a text
        given = float(given) if isinstance(given, str) else given
    if _number(given, above=0):
        return given
    raise ValueError("write a number above 0, or auto")


LEAST_CALIBRATION_TOKENS = 16_384
CALIBRATION_TOKENS_PER_FEATURE = 4


class LibraryConfig(Section):
    """Blockwise local distillation.

    Mode `decoupled` trains every attention variant and every FFN variant beside the parent's other half. Mode `coupled` trains every
    pair of them, both halves together. It needs `narrow_from`: an architecture.json, a sweep.json or sweep.parquet, or the folder of
    such an artifact (path or URL). One of a later round counts with what the rounds before replaced. The search space of every layer is
    narrowed to the variants found there. `start_from` is the folder of a decoupled library of the same parent (path or URL); its trained
    halves are then the start. With `early_stop` a variant stops training when its loss is flat. It then misses the rest of the learning
    rate's decay, which costs quality, so this is off by default. A variant whose loss rises goes back to its start with half the rate. The
    library's table has the largest singular value and the sensitivity to noise of every variant beside the parent's own; what stands out
    is a warning.

    With `gradient_accumulation` an optimizer step takes several micro-batches; its loss is the mean of theirs. The learning rate, early
    stop and loss curves count optimizer steps. With `learning_rate: auto` every variant finds its own by short trials, see
    `puzzle_ray.distill.rate_trials`.
    """

    mode: Literal["decoupled", "coupled"] = "decoupled"
    narrow_from: str | None = None
    start_from: str | None = None
    max_pairs: Count = 24  # per layer, coupled; each has weights, gradients and two moments in memory
    loss: BlockLoss = BlockLoss()
    early_stop: EarlyStop | None = None
    tokens: Count = 1_000_000
    calibration_tokens: Count | Literal["auto"] = "auto"
    validation_tokens: Count = 8_192
    micro_batch_tokens: Count = 2048
    gradient_accumulation: Count = 1  # micro-batches in one optimizer step
    learning_rate: float | Literal["auto"] = 1e-3
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: NonNegative = 0.0
    gradient_clip: Positive = 1.0
    checkpoint_every: Count | None = None  # micro-batches between two checkpoints; unset, they go by time
    checkpoint_minutes: Positive = 10.0  # between two checkpoints, which are written in the background
    window: Count | Literal["auto"] = "auto"  # micro-batches in flight; auto: two more than shards, so that none of them waits
    parent_dtype: DType = "float32"  # in which the parent computes its activations
    activation_dtype: DType = "float32"  # in which activations go from the parent to the trainers
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast; weights, optimizer and loss stay float32

    @field_validator("learning_rate", mode="before")
    @classmethod
    def _rate(cls, given: Any) -> Any:
        return _rate_or_auto(given)

    @model_validator(mode="after")
    def _coupled_is_narrow(self) -> LibraryConfig:
        if self.mode == "coupled" and self.narrow_from is None:
            problem = "mode coupled trains whole pairs, too many of them in a whole search space"
            raise ValueError(f"{problem}; set narrow_from to an architecture.json or a sweep of a decoupled run")
        return self

    def for_parent(self, model_config: Any) -> LibraryConfig:
        """The same with a number in place of `calibration_tokens: auto`, by the config of the parent.

        `CALIBRATION_TOKENS_PER_FEATURE` tokens for each inner activation of its FFN, which is its widest one, and
        `LEAST_CALIBRATION_TOKENS` at least. Starts are fitted on one half of the tokens and judged on the other, so either half needs
        more tokens than there are features; with fewer its second moment is singular.
        """
        if self.calibration_tokens != "auto":
            return self
        widest = max(int(model_config.hidden_size), ffn_width(model_config))
        tokens = max(LEAST_CALIBRATION_TOKENS, CALIBRATION_TOKENS_PER_FEATURE * widest)
        return self.model_copy(update={"calibration_tokens": tokens})

    def in_flight(self, num_shards: int) -> int:
        """Micro-batches at the most."""
        return num_shards + 2 if self.window == "auto" else self.window

    def identity(self) -> dict[str, Any]:
        """The settings that a library's content depends on. What names another artifact stands among the inputs, by its key."""
        without_effect = {"window", "checkpoint_every", "checkpoint_minutes", "max_pairs"}
        without_effect |= {"gradient_accumulation"} if self.gradient_accumulation == 1 else set()
        return self.model_dump(mode="json", exclude=without_effect | {"narrow_from", "start_from"})


Mix = tuple[float, float, float]  # weights of KL, cosine and next-token loss
MIXES: dict[str, Mix] = {
    "lm": (0.0, 0.0, 1.0),
    "kld": (1.0, 0.0, 0.0),
    "cosine": (0.0, 1.0, 0.0),
    "lm+kld": (1.0, 0.0, 1.0),
    "lm+cosine": (0.0, 1.0, 1.0),
    "kld+cosine": (1.0, 1.0, 0.0),
    "lm+kld+cosine": (1.0, 1.0, 1.0),
}
Preset = Literal["none", "lm", "kld", "cosine", "lm+kld", "lm+cosine", "kld+cosine", "lm+kld+cosine", "paper"]


class LmTokens(Section):
    """Which tokens the next-token loss counts. What is set must hold together.

    `after` and `until` are texts around an answer, such as a chat template's `<|assistant|>` and `<|end|>`. Tokens behind the first
    count, up to and with the second. A sequence that begins inside an answer counts from its next `after` on.
    `min_parent_probability`: tokens count to which the parent gives at least this probability. The loss is a mean over the tokens of a
    micro-batch that count, 0 where none does; of a step's micro-batches each weighs the same, however many of its tokens count.
    """

    after: str | None = None
    until: str | None = None
    min_parent_probability: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _whole_rule(self) -> LmTokens:
        if bool(self.after) != bool(self.until):
            raise ValueError("an answer has two ends; set both gkd.lm_tokens.after and gkd.lm_tokens.until")
        if not self.after and not self.min_parent_probability:
            raise ValueError("nothing is chosen; set after and until, or min_parent_probability, or leave out gkd.lm_tokens")
        return self


class GkdStage(Section):
    """One stage of a length curriculum. Longer sequences are consecutive ones of the tokenised text, joined."""

    sequence_length: Count
    tokens: Count
    micro_batch_tokens: Count  # per worker and step

    @model_validator(mode="after")
    def _whole_sequences(self) -> GkdStage:
        if self.micro_batch_tokens % self.sequence_length:
            problem = f"micro_batch_tokens={self.micro_batch_tokens} is no multiple of sequence_length={self.sequence_length}"
            raise ValueError(f"{problem}; a micro-batch holds whole sequences")
        return self


class GkdConfig(Section):
    """Global knowledge distillation: the weights of the loss terms, and how to train.

    `preset` names a mix of LM, KLD and cosine loss, each of weight 1 (the paper's eight, with `none` for no distillation); `paper` is
    the one that the paper chose, KLD and cosine. Weights that are set beside a preset go on top of it. `cosine_reduction`: the cosine
    distances of all layers are added up in the paper, and in `paper`; elsewhere their mean is taken, so that the weight means the same
    for every depth. `cosine_layers`: the weights of the layers in it; `kept` leaves out layers that the child has removed whole. KL is
    taken at `temperature`, times its square. `learning_rate: auto` chooses it by a range test, see `puzzle_ray.distill.range_test`.
    With `stages`, lengths and tokens are theirs, and neither `tokens` nor `micro_batch_tokens` is read.

    Training is watched on `heldout_tokens` of held-out text, with the weights as they would be published, in the child's own dtype:
    the best ones are published, those of the start where nothing was better. A rise of the KL over the start goes back and halves
    the rate, at most three times; within five steps of where training began, it counts only at the end. With `average_weights` the
    learning rate stays at its peak after warm-up, and what is watched and published is a running average of the weights: in a training
    of few steps it takes more of their noise away than a rate that falls, see `puzzle_ray.distill.averaging`.

    `parallel`: with `ddp` every worker holds the whole child, its gradients and optimizer, and the whole parent. With `fsdp` (FSDP2)
    each holds its part of them, and gathers one layer at a time. `auto` takes `fsdp` where there are two GPU workers or more, and what
    one of them would hold of weights, gradients and optimizer takes more than half of its GPU's memory; else `ddp`, and on CPUs always.
    Both do the same work and differ in rounding.
    """

    preset: Preset | None = None
    tokens: Annotated[int, Field(ge=0)] = 1_000_000
    micro_batch_tokens: Count = 2048  # per worker, in one forward
    gradient_accumulation: Count = 1  # micro-batches of each worker in one optimizer step
    step_tokens: Count | None = (
        None  # of one optimizer step; with hardware: auto, what workers, micro-batches and accumulation make
    )
    stages: tuple[GkdStage, ...] = ()
    num_workers: Count = 1
    learning_rate: float | Literal["auto"] = 3e-4
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: NonNegative = 0.0
    gradient_clip: Positive = 1.0
    average_weights: bool = False
    kl_weight: NonNegative = 1.0
    cosine_weight: NonNegative = 1.0
    lm_weight: NonNegative = 0.0
    temperature: Positive = 1.0
    cosine_reduction: Literal["mean", "sum"] = "mean"
    cosine_layers: Literal["all", "kept"] | tuple[float, ...] = "all"
    lm_tokens: LmTokens | None = None
    heldout_tokens: Annotated[int, Field(ge=0)] = (
        8_192  # that training is watched on, so that it never makes a child worse; 0: it is not
    )
    heldout_looks: Count = 10  # over the whole training
    checkpoint_every: Count = 50  # steps
    max_failures: Annotated[int, Field(ge=-1)] = 3  # of workers, between two checkpoints; -1: any number; a preempted node's not
    use_gpu: bool = False
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the child; auto: bfloat16 on GPUs beside a parent in half
    parent_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on CPUs, on GPUs the parent's own
    activation_checkpointing: bool = False  # layers keep only their inputs, and run again in the backward pass
    cpu_offload: bool = False  # fsdp: weights, gradients and optimizer lie in the host's memory
    min_workers: Count | None = None  # it starts with so many where num_workers find no room; fewer share the same micro-batches

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, given: Any) -> Any:
        """The settings that a preset stands for, below those that are given."""
        preset = given.get("preset") if isinstance(given, dict) else None
        if preset == "none":
            return given | {"tokens": 0, "stages": ()}
        mix = MIXES.get("kld+cosine" if preset == "paper" else str(preset))
        if mix is None:
            return given
        settings = dict(zip(("kl_weight", "cosine_weight", "lm_weight"), mix, strict=True))
        return settings | ({"cosine_reduction": "sum"} if preset == "paper" else {}) | given

    @field_validator("learning_rate", mode="before")
    @classmethod
    def _rate(cls, given: Any) -> Any:
        return _rate_or_auto(given)

    @field_validator("cosine_layers", mode="before")
    @classmethod
    def _weights(cls, given: Any) -> Any:
        if given in ("all", "kept") or (isinstance(given, list | tuple) and all(w == 0 or _number(w, above=0) for w in given)):
            return given
        raise ValueError("write all, kept, or a list of weights, one per layer, each at least 0")

    @model_validator(mode="after")
    def _some_loss(self) -> GkdConfig:
        if self.kl_weight + self.cosine_weight + self.lm_weight == 0:
            raise ValueError("all loss weights are 0; set gkd.kl_weight, gkd.cosine_weight or gkd.lm_weight")
        if self.learning_rate == AUTO and self.trains and not self.heldout_tokens:
            raise ValueError("learning_rate auto is chosen by held-out KL, and heldout_tokens is 0; set gkd.heldout_tokens")
        if self.lm_tokens is not None and not self.lm_weight:
            raise ValueError("lm_tokens chooses tokens for a loss of weight 0; set gkd.lm_weight, or leave out gkd.lm_tokens")
        if not isinstance(self.cosine_layers, str) and not sum(self.cosine_layers):
            raise ValueError("all weights of gkd.cosine_layers are 0; set gkd.cosine_weight=0 instead")
        return self

    @model_validator(mode="after")
    def _workers_that_can_be(self) -> GkdConfig:
        if self.cpu_offload and not (self.use_gpu and self.parallel == "fsdp"):
            raise ValueError(
                "cpu_offload moves what FSDP shards from GPUs to the host; set gkd.use_gpu=true and gkd.parallel=fsdp"
            )
        if self.min_workers is not None and self.min_workers > self.num_workers:
            problem = f"min_workers={self.min_workers} is more than num_workers={self.num_workers}"
            raise ValueError(f"{problem}; lower gkd.min_workers")
        return self

    @property
    def trains(self) -> bool:
        return bool(self.tokens or self.stages)

    @property
    def why_none(self) -> tuple[str, str]:
        """Why nothing is trained, and what to write instead."""
        if self.preset == "none":
            return "gkd.preset=none is no distillation", "name another preset"
        return "gkd.tokens is 0", "set gkd.tokens"

    @property
    def total_tokens(self) -> int:
        """Of the whole distillation."""
        return sum(stage.tokens for stage in self.stages) if self.stages else self.tokens

    @property
    def largest_micro_batch(self) -> int:
        """Tokens of a worker in one forward, at the most."""
        return max((stage.micro_batch_tokens for stage in self.stages), default=self.micro_batch_tokens)

    @property
    def total_steps(self) -> int:
        """Optimizer steps until all tokens are used, rounded up in every stage; 0 for 0 tokens."""
        return sum(steps for steps, _ in self._steps)

    @property
    def _steps(self) -> list[tuple[int, int]]:
        """Of every stage its optimizer steps, and the tokens of one."""
        parts = [(s.tokens, s.micro_batch_tokens) for s in self.stages] or [(self.tokens, self.micro_batch_tokens)]
        each = [micro_batch * self.num_workers * self.gradient_accumulation for _, micro_batch in parts]
        return [(math.ceil(tokens / step), step) for (tokens, _), step in zip(parts, each, strict=True)]

    def tokens_until(self, step: int) -> int:
        """Tokens that the first `step` optimizer steps read."""
        read = 0
        for steps, tokens in self._steps:
            read += min(step, steps) * tokens
            step -= min(step, steps)
        return read

    def race_steps(self, rungs: int) -> tuple[int, ...]:
        """The steps after which finalists of the pick are compared (`search.race_rungs`). The last rung, which is the end, is left out."""
        total, every = self.total_steps, max(1, self.total_steps // self.heldout_looks)
        return tuple(step for step in rung_steps(total, every, rungs) if step < total)

    def shortened(self, tokens: int) -> GkdConfig:
        """The same for another number of tokens, in one stage."""
        return self.model_copy(update={"tokens": tokens, "stages": ()})

    def identity(self) -> dict[str, Any]:
        """The settings that a distilled child depends on.

        A preset counts by what it stands for. `auto` chooses by the devices, which no key has, between ways that differ in rounding.
        """
        without_effect = {"checkpoint_every", "max_failures", "preset", "activation_checkpointing", "cpu_offload", "min_workers"}
        without_effect |= {"step_tokens"}
        without_effect |= {"tokens", "micro_batch_tokens"} if self.stages else set()
        without_effect |= {"parallel"} if self.parallel != "fsdp" else set()
        without_effect |= {"average_weights"} if not self.average_weights else set()
        without_effect |= {name for name in ("compute_dtype", "parent_dtype") if getattr(self, name) == AUTO}
        return self.model_dump(mode="json", exclude=without_effect)

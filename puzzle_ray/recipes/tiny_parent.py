"""A small trained Llama that any machine can make. It learns to tell the short stories of `puzzle_ray.recipes.stories`.

This text is there without a network. Two minutes on two cores bring the model so far that it tells stories of its own which keep to their
facts, so that damage to it can be measured, and read. The same spec, torch and number of threads give the same weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from puzzle_ray.errors import ConfigError, DataError, StoreError
from puzzle_ray.progress import Progress, Quiet
from puzzle_ray.recipes.muon import Muon
from puzzle_ray.recipes.stories import stories
from puzzle_ray.store import Artifact

FORMAT_VERSION = 2  # raise it whenever the same spec gives another folder
BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1

EVALUATION_BATCH_SIZE = 16  # windows; it bounds memory and does not change the loss
CURVE_POINTS = 20
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_EVERY = 50  # steps


@dataclass(frozen=True)
class TinyParentSpec:
    """Everything that the tiny parent depends on, except the grammar of its text.

    Raises ValueError for a value that cannot work.
    """

    num_stories: int = 6000
    heldout_share: float = 0.1  # of the stories
    vocab_size: int = 1024
    num_hidden_layers: int = 8
    hidden_size: int = 192
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    intermediate_size: int = 512
    max_position_embeddings: int = 1024
    initializer_range: float = 0.06  # near 1 / sqrt(hidden_size); Llama's 0.02 is too small for a short training
    sequence_length: int = 256  # tokens per training window
    batch_size: int = 4  # windows per step
    steps: int = 400
    warmup_steps: int = 20
    learning_rate: float = 3e-3  # peak, of embeddings and norms (AdamW); it falls to zero along a cosine
    matrix_learning_rate: float = 0.02  # of the layers' matrices (Muon)
    weight_decay: float = 0.1  # on matrices only
    max_grad_norm: float = 1.0
    heldout_windows: int = 64  # at most, evenly spread over the held-out text
    seed: int = 0

    def __post_init__(self) -> None:
        may_be_zero = {"seed", "warmup_steps", "weight_decay"}
        for name, value in asdict(self).items():
            if value < 0 or (value == 0 and name not in may_be_zero):
                least = "at least 0" if name in may_be_zero else "positive"
                raise ValueError(f"{name}={value} must be {least}")
        if not self.heldout_share < 1:
            raise ValueError(f"heldout_share={self.heldout_share} must lie between 0 and 1, ends excluded")
        if self.vocab_size < 258:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 258: 256 bytes and two special tokens")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 2 * num_attention_heads={2 * self.num_attention_heads}: "
                "rotary embeddings turn pairs of channels"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.sequence_length > self.max_position_embeddings:
            raise ValueError(
                f"sequence_length={self.sequence_length} must not exceed max_position_embeddings={self.max_position_embeddings}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be below steps={self.steps}")


@dataclass(frozen=True)
class TinyParentSummary:
    """The result of a training. Losses and entropy are in nats per token. `losses` holds (steps done, mean loss since the last entry)."""

    heldout_loss: float
    unigram_entropy: float
    num_parameters: int
    train_tokens: int  # seen by the model in training
    seconds: float
    losses: tuple[tuple[int, float], ...]


def source_fingerprint(spec: TinyParentSpec) -> str:
    """Hex digest of everything that decides the result: format, spec, and the source of the grammar."""
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, asdict(spec)], sort_keys=True).encode())
    digest.update(files("puzzle_ray.recipes").joinpath("stories.py").read_bytes())
    return digest.hexdigest()


def read_stories(spec: TinyParentSpec) -> tuple[list[str], list[str]]:
    """(train, held-out) stories, at least one of each."""
    texts = stories(spec.num_stories, spec.seed)
    num_heldout = min(max(1, round(spec.heldout_share * len(texts))), len(texts) - 1)
    return texts[:-num_heldout], texts[-num_heldout:]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `<s>` = 0 and `</s>` = 1. It can encode every text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Iterator[Tensor]:
    """Token ids (int64) of one text after another, each as `<s> text </s>`."""
    for text in texts:
        ids = tokenizer.backend_tokenizer.encode(text).ids
        yield torch.tensor([BOS_ID, *ids, EOS_ID])


def unigram_entropy(targets: Tensor, train_ids: Tensor, vocab_size: int) -> float:
    """Nats per token of `targets` under the add-one smoothed token frequencies of `train_ids`."""
    counts = torch.bincount(train_ids, minlength=vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[targets.flatten()].mean())


def _windows(ids: Tensor, sequence_length: int, split: str) -> Tensor:
    """Consecutive windows [N, sequence_length + 1]. The last token of a window is the first of the next."""
    if len(ids) <= sequence_length:
        raise DataError(
            f"{split} text",
            f"{len(ids)} tokens do not fill one window of {sequence_length} tokens and its next token",
            "raise num_stories or lower sequence_length",
        )
    return ids.unfold(0, sequence_length + 1, sequence_length)


def model_config(spec: TinyParentSpec) -> LlamaConfig:
    """The config of the parent that a spec describes."""
    return LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        max_position_embeddings=spec.max_position_embeddings,
        initializer_range=spec.initializer_range,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        dtype=torch.float32,
    )


def _new_model(spec: TinyParentSpec) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return LlamaForCausalLM(model_config(spec))


def _loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats, on windows [B, T + 1]."""
    logits = model(windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def _learning_rate_factor(spec: TinyParentSpec, step: int) -> float:
    """Linear warm-up to 1, then a cosine to zero."""
    if step < spec.warmup_steps:
        return (step + 1) / (spec.warmup_steps + 1)
    done = (step - spec.warmup_steps) / (spec.steps - spec.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


class Training:
    """Trains a model in place on `windows` [N, T + 1], in another random order every epoch.

    `state_tensors` is all that is carried from step to step: who loads it goes on to the same bits.
    """

    def __init__(self, model: LlamaForCausalLM, windows: Tensor, spec: TinyParentSpec) -> None:
        generator = torch.Generator().manual_seed(spec.seed)
        epochs = math.ceil(spec.steps * spec.batch_size / len(windows))
        self.order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(epochs)])
        self.model, self.windows, self.spec = model, windows, spec
        self.parameters = dict(model.named_parameters())
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self.parameters.values() if all(p is not matrix for matrix in matrices)]
        self.muon = Muon(matrices, spec.weight_decay)
        self.adamw = torch.optim.AdamW(others, lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.steps_done, self.started, self.seconds_before = 0, time.perf_counter(), 0.0
        self.curve: list[tuple[int, float]] = []  # of CURVE_POINTS entries
        self.recent: list[float] = []  # losses since the last entry

    def step(self) -> float:
        """Its loss. Raises ConfigError where that is not finite."""
        spec, start = self.spec, self.steps_done * self.spec.batch_size
        factor = _learning_rate_factor(spec, self.steps_done)
        self.adamw.param_groups[0]["lr"] = factor * spec.learning_rate
        loss = _loss(self.model, self.windows[self.order[start : start + spec.batch_size]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), spec.max_grad_norm)
        self.muon.step(factor * spec.matrix_learning_rate)
        self.adamw.step()
        self.adamw.zero_grad()
        value = loss.item()
        if not math.isfinite(value):
            problem = f"{spec.learning_rate} makes the tiny parent's loss {value} at step {self.steps_done}"
            raise ConfigError("learning_rate", problem, "lower it")
        self.recent.append(value)
        self.steps_done += 1
        if len(self.recent) >= spec.steps / CURVE_POINTS or self.steps_done == spec.steps:
            self.curve.append((self.steps_done, sum(self.recent) / len(self.recent)))
            self.recent.clear()
        return value

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights, Muon's averages, AdamW's moments, losses, steps done and seconds. The live tensors, not copies."""
        seconds = self.seconds_before + time.perf_counter() - self.started
        numbers: dict[str, Any] = {"curve": self.curve, "recent": self.recent, "done": [self.steps_done, seconds]}
        state = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        state |= {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        state |= {f"muon.{i}": average for i, (_, average) in enumerate(self.muon.groups)}
        for number, slots in self.adamw.state_dict()["state"].items():
            state |= {f"adamw.{number}.{name}": value for name, value in slots.items()}
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_tensors`, for a training of the same spec."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"model.{name}"])
        for i, (_, average) in enumerate(self.muon.groups):
            average.copy_(state[f"muon.{i}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("adamw."):
                _, number, slot = name.split(".")
                moments.setdefault(int(number), {})[slot] = value
        self.adamw.load_state_dict(self.adamw.state_dict() | {"state": moments})
        self.curve = [(int(steps), loss) for steps, loss in state["curve"].tolist()]
        self.recent = state["recent"].tolist()
        steps_done, self.seconds_before = state["done"].tolist()
        self.steps_done = int(steps_done)


def _train(training: Training, progress: Progress, artifact: Artifact | None) -> None:
    """To the last step; with an artifact, from its checkpoint where there is one, and with one every CHECKPOINT_EVERY steps."""
    training.model.train()
    if artifact and artifact.exists(CHECKPOINT):
        training.load_state_tensors(artifact.read_tensors(CHECKPOINT)[0])
    with progress.stage("train the tiny parent", training.spec.steps, "steps") as bar:
        bar.advance(training.steps_done)
        while training.steps_done < training.spec.steps:
            bar.advance(loss=training.step())
            if artifact and training.steps_done % CHECKPOINT_EVERY == 0:
                artifact.write_tensors(CHECKPOINT, training.state_tensors())
    training.model.eval()


@torch.no_grad()
def _evaluate(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Mean loss in nats per token over `windows` [N, T + 1]."""
    losses = [_loss(model, batch) * len(batch) for batch in windows.split(EVALUATION_BATCH_SIZE)]
    return float(torch.stack(losses).sum()) / len(windows)


def _write_jsonl(path: Path, texts: Sequence[str]) -> None:
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def make_tiny_parent(artifact: Artifact, spec: TinyParentSpec, progress: Progress) -> None:
    """The whole stage: fills the artifact's folder `parent` and finishes it. A training that was broken off goes on to the same bits."""
    with artifact.folder_to_publish("parent") as folder:
        summary = build_tiny_parent(folder, spec, progress, artifact)
    artifact.finish(asdict(summary), drop=[CHECKPOINT])


def build_tiny_parent(
    folder: Path, spec: TinyParentSpec | None = None, progress: Progress | None = None, artifact: Artifact | None = None
) -> TinyParentSummary:
    """Trains the tiny parent (default spec: about two minutes on two cores) and writes it into the empty `folder`.

    `model/` is a Hugging Face folder with its tokenizer; `train.jsonl` and `heldout.jsonl` hold one {"text"} object per story;
    `summary.json` holds the returned summary. With an artifact the training is saved there now and then. Raises
    StoreError if `folder` is not an empty folder, DataError if there is too little text, ConfigError if the training diverges.
    """
    spec = spec if spec is not None else TinyParentSpec()
    progress = progress if progress is not None else Quiet()
    if not folder.is_dir() or any(folder.iterdir()):
        raise StoreError(str(folder), "is not an empty folder", "make a new folder for the tiny parent")
    started = time.perf_counter()
    train, heldout = read_stories(spec)
    with progress.stage("train the tokenizer", 1, "tokenizer") as bar:
        tokenizer = train_tokenizer(train, spec.vocab_size)
        bar.advance()
    ids: dict[str, Tensor] = {}
    with progress.stage("tokenize", len(train) + len(heldout), "stories") as bar:
        for name, texts in (("train", train), ("held-out", heldout)):
            pieces = []
            for piece in token_stream(tokenizer, texts):
                pieces.append(piece)
                bar.advance()
            ids[name] = torch.cat(pieces)
    train_windows = _windows(ids["train"], spec.sequence_length, "train")
    heldout_windows = _windows(ids["held-out"], spec.sequence_length, "held-out")
    num_evaluated = min(spec.heldout_windows, len(heldout_windows))
    heldout_windows = heldout_windows[torch.arange(num_evaluated) * len(heldout_windows) // num_evaluated]

    model = _new_model(spec)
    training = Training(model, train_windows, spec)
    _train(training, progress, artifact)
    heldout_loss = _evaluate(model, heldout_windows)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(str(folder / "model"))
    _write_jsonl(folder / "train.jsonl", train)
    _write_jsonl(folder / "heldout.jsonl", heldout)
    summary = TinyParentSummary(
        heldout_loss=heldout_loss,
        unigram_entropy=unigram_entropy(heldout_windows[:, 1:], ids["train"], spec.vocab_size),
        num_parameters=sum(p.numel() for p in model.parameters()),
        train_tokens=spec.steps * spec.batch_size * spec.sequence_length,
        seconds=training.seconds_before + time.perf_counter() - started,
        losses=tuple(training.curve),
    )
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary

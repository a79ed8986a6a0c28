"""What the processes of the evaluation hold: one in each of its phases, and the most of them; or shards, and who asks them.

It reads the parent, then every child beside what it keeps of the parent, a few tokens' logits at a time; then it times parent and child
side by side. See `puzzle_ray.evaluation.evaluate`. With `evaluate.num_shards`, layers lie in shards, and nothing is timed: then the stage
`quality` is counted, too, whose readers ask such shards in float32.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from puzzle_ray.artifacts import MIB, LayerChoice
from puzzle_ray.config import RunConfig
from puzzle_ray.errors import ConfigError
from puzzle_ray.evaluation.evaluate import ROOM
from puzzle_ray.models.child import child_without_weights, new_child
from puzzle_ray.models.head import Head, chunk_tokens
from puzzle_ray.models.shards import runs_of_layers
from puzzle_ray.planning.activations import masks_of
from puzzle_ray.planning.needs import Demand
from puzzle_ray.planning.sizes import FLOAT32_BYTES, Sizes
from puzzle_ray.profiling.batch_sizes import with_batch_sizes
from puzzle_ray.profiling.measure import stack_config
from puzzle_ray.profiling.memory import KeptTokens, kept_tokens, peak_bytes, peak_of
from puzzle_ray.profiling.scenarios import AUTO
from puzzle_ray.scoring.metrics import measures_of_heads
from puzzle_ray.scoring.plan import dtype_bytes

Parts = dict[str, int]
_LAYERS = 2  # of a model whose activations are counted: a deeper one holds no more at a time
_LOGITS_OF_A_READER = 2  # float32 tensors of the size of a batch's logits, see `puzzle_ray.evaluation.reader`
_WIDTH = 8  # of hidden states whose logits are counted: they are no larger for wider ones


def evaluation_phases(config: RunConfig, sizes: Sizes, gpu_bytes: int, kept: float = 1.0) -> dict[str, Parts]:
    """What is in memory in each phase, in bytes by kind. The child has the share `kept` of the parent's parameters.

    Models are timed together where they fit, else one after the other; on several GPUs each is spread over them. `gpu_bytes` is the
    memory of a GPU, 0 where it is not known.
    """
    profile, on_cpu = config.profile, not config.profile.num_gpus
    own, timed_in = _own_dtype(sizes), "bfloat16" if profile.dtype == "fp8" else profile.dtype
    parent, timed = sizes.total * dtype_bytes(own), sizes.total * dtype_bytes(timed_in)
    kept_of_parent = {
        "parent's head": sizes.config.vocab_size * sizes.config.hidden_size * dtype_bytes(own),
        "parent's final states": config.evaluate.tokens * sizes.config.hidden_size * dtype_bytes(own),
    }
    reading = kept_of_parent | _reading(config, sizes, own)
    phases: dict[str, Parts] = {"a child is read": {"one model": int(kept * parent)} | reading}
    if on_cpu:  # where the head is a copy; on a GPU it is the parent's own
        phases["the parent is read"] = {"one model": parent} | reading
    timing = _timing(config, sizes, timed_in, gpu_bytes)
    needed = ROOM * 2 * timed + timing["KV cache"]
    alone = not on_cpu and bool(gpu_bytes) and needed > gpu_bytes * max(1, profile.num_gpus)
    models = {"one model": timed} if alone else {"two models": int((1 + kept) * timed)}
    if on_cpu and own != timed_in:
        phases["the child is loaded"] = models | {"its file": int(kept * parent)}
    return phases | {"models are timed": models | timing}


def evaluation_demand(config: RunConfig, sizes: Sizes, gpu_bytes: int) -> Demand:
    """Of one worker, in the phase that needs most."""
    parts = max(evaluation_phases(config, sizes, gpu_bytes).values(), key=lambda each: sum(each.values()))
    remedy = (
        "raise profile.num_gpus: a model is spread over so many GPUs of a node; where a node has too few, set evaluate.num_shards"
    )
    remedy += "; or lower profile.max_batch_size" if config.profile.batch_sizes == AUTO else ""
    return Demand("evaluation", "worker", 1, parts, float(config.profile.num_gpus), remedy)


def evaluation_demands(config: RunConfig, sizes: Sizes, gpu_bytes: int) -> list[Demand]:
    """Of all processes of the evaluation."""
    return sharded_demands(config, sizes) if config.evaluate.num_shards else [evaluation_demand(config, sizes, gpu_bytes)]


def sharded_demands(config: RunConfig, sizes: Sizes) -> list[Demand]:
    """Of the shard that needs most and of who asks it: of the evaluation in the models' own dtype, of readers in float32."""
    evaluate, length, own = config.evaluate, config.data.sequence_length, _own_dtype(sizes)
    text, window = (evaluate.sequences(length), length), evaluate.window_tokens or length
    read = max(1, evaluate.batch_tokens // window)
    states = {"parent's final states": evaluate.tokens * sizes.config.hidden_size * dtype_bytes(own)}
    values = sizes.config.vocab_size * text[0] * length
    chunk = {"logits": int(min(values, _chunk_values(config, sizes)) * bytes_per_logit(sizes.stack.output_head, own))}
    whole = {"logits": _LOGITS_OF_A_READER * read * window * sizes.config.vocab_size * FLOAT32_BYTES}
    kept = {"parent's head": sizes.config.vocab_size * sizes.config.hidden_size * dtype_bytes(own)}
    on_gpu = config.cluster.gpus_per_shard > 0
    beside, host = (kept | chunk, states) if on_gpu else (kept | states | chunk, {})
    return [
        *_shards_and_worker("evaluation", config, sizes, own, text, beside, host),
        *_shards_and_worker("quality", config, sizes, "float32", (read, window), whole),
    ]


def _shards_and_worker(
    stage: str, config: RunConfig, sizes: Sizes, dtype: str, batch: tuple[int, int], beside: Parts, host: Parts | None = None
) -> list[Demand]:
    """`batch`: sequences and their tokens. `beside` is what who asks holds besides the ends of a model, `host` what it has beside a GPU."""
    each, depth, share = dtype_bytes(dtype), len(sizes.layers), config.cluster.gpus_per_shard
    runs = runs_of_layers(depth, config.evaluate.num_shards)
    work = {"activations": forward_bytes(sizes, dtype, *batch)}
    work |= masks_of(config, sizes.config, batch[0] * batch[1], each, length=batch[1])
    shard = {"weights": max(sum(sizes.layers[n] for n in run) for run in runs) * each} | work
    ends = {"ends of a model": (sizes.total - sum(sizes.layers)) * each} | beside
    smaller = "evaluate.micro_batch_tokens" if stage == "evaluation" else "evaluate.batch_tokens"
    more, larger = f"raise evaluate.num_shards, or lower {smaller}", f"lower {smaller}, or raise cluster.gpus_per_shard"
    return [
        Demand(stage, "shard", len(runs), shard, share, more, "lower evaluate.num_shards", in_turn=True),
        Demand(stage, "worker", 1, ends, share, larger, host=host or {}),
    ]


def _chunk_values(config: RunConfig, sizes: Sizes) -> int:
    """Logits that are computed at a time where shards compute."""
    device = torch.device("cuda" if config.cluster.gpus_per_shard else "cpu")
    return chunk_tokens(sizes.config.vocab_size, device) * int(sizes.config.vocab_size)


def _own_dtype(sizes: Sizes) -> str:
    """In which models are read: the one that the parent is stored in."""
    return str(getattr(sizes.config, "dtype", None) or torch.float32).removeprefix("torch.")


def _reading(config: RunConfig, sizes: Sizes, dtype: str) -> Parts:
    """Of a forward pass over a micro-batch, or of the logits that are computed of its states: whatever is more."""
    length, tokens = config.data.sequence_length, config.evaluate.micro_batch_tokens
    batch = config.evaluate.sequences(length)
    layers = {"activations": forward_bytes(sizes, dtype, batch, length)}
    layers |= masks_of(config, sizes.config, tokens, FLOAT32_BYTES)
    device = torch.device("cpu" if not config.profile.num_gpus else "cuda")
    vocab_size = sizes.config.vocab_size
    chunk = min(batch * length, chunk_tokens(vocab_size, device))
    logits = {"logits": int(chunk * vocab_size * bytes_per_logit(sizes.stack.output_head, dtype))}
    return max(layers, logits, key=lambda each: sum(each.values()))


def _timing(config: RunConfig, sizes: Sizes, dtype: str, gpu_bytes: int) -> Parts:
    """Of the longest requests, at the largest batch size that is named: the KV cache of one model, and a prefill.

    For `auto`, at the one at which the parent will be compared.
    """
    scenario, batch = config.profile.scenario, _largest_batch(config, sizes, gpu_bytes)
    kinds, tokens = [layer.layer_type for layer in sizes.space.layers], scenario.longest_tokens
    kept = {kind: _kept_of_a_layer(sizes, kind, dtype) for kind in dict.fromkeys(kinds)}
    cache = batch * sum(kept[kind].bytes_each * kept[kind].of(tokens) for kind in kinds)
    prompt = max(int(shape.input_tokens) for shape, _ in scenario.shapes)
    return {"KV cache": cache, "activations": forward_bytes(sizes, dtype, batch, prompt)}


def _largest_batch(config: RunConfig, sizes: Sizes, gpu_bytes: int) -> int:
    profile, limit_mib = config.profile, config.search.limits.memory_mib
    if profile.batch_sizes != AUTO:
        return max(profile.scenario.batch_size, *profile.batch_sizes, 0)
    if profile.memory_mib is None and profile.device is None and gpu_bytes and profile.num_gpus:
        profile = profile.model_copy(update={"memory_mib": profile.num_gpus * gpu_bytes / MIB})
    key = ("batch", profile.model_dump_json(), limit_mib)
    if key not in sizes.evaluated:
        try:
            found = with_batch_sizes(profile, sizes.config, sizes.space, limit_mib)
        except (
            ConfigError
        ):  # no memory is known, or the parent does not fit: a run says so before work, and this is no place for it
            found = profile
        sizes.evaluated[key] = found.scenario.batch_size
    return int(sizes.evaluated[key])


def _kept_of_a_layer(sizes: Sizes, kind: str, dtype: str) -> KeptTokens:
    key = ("kept", kind, dtype)
    if key not in sizes.evaluated:
        model = child_without_weights(stack_config(sizes.config, kind, 1), [LayerChoice()], getattr(torch, dtype))
        sizes.evaluated[key] = kept_tokens(model)[0]
    found: KeptTokens = sizes.evaluated[key]
    return found


def forward_bytes(sizes: Sizes, dtype: str, batch: int, tokens: int) -> int:
    """The most that a forward pass holds besides weights and KV cache, of the real classes with shapes only."""
    key = ("forward", dtype, batch, tokens)
    if key not in sizes.evaluated:
        kinds = dict.fromkeys(layer.layer_type for layer in sizes.space.layers)
        build = partial(new_child, choices=[LayerChoice()] * _LAYERS, dtype=getattr(torch, dtype))
        shapes = [stack_config(sizes.config, kind, _LAYERS) for kind in kinds]
        sizes.evaluated[key] = max(peak_bytes(partial(build, shape), batch, tokens) for shape in shapes)
    return int(sizes.evaluated[key])


def bytes_per_logit(like: Head, dtype: str) -> float:
    """What a logit of a child costs while it is compared with the parent's, by the function that does it, with shapes only."""
    vocab_size = 1 << 12
    tokens = 2 * chunk_tokens(vocab_size, torch.device("cpu"))  # two chunks: something of the first may stay
    with FakeTensorMode(), torch.inference_mode():
        head = replace(like, linear=nn.Linear(_WIDTH, vocab_size, bias=False, dtype=getattr(torch, dtype)))
        states, ids = torch.zeros(1, tokens, _WIDTH, dtype=getattr(torch, dtype)), torch.zeros(tokens, dtype=torch.long)
        most = peak_of(lambda: measures_of_heads(head, head, ids, states, states))
    return most / (tokens // 2 * vocab_size)

"""What a plan says of the evaluation's process is what its phases hold."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from small_models import save_parent, tiny_config

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.config import RunConfig
from puzzle_ray.evaluation.evaluate import Reference
from puzzle_ray.models import head as heads
from puzzle_ray.models.child import load_model, new_child, read_config
from puzzle_ray.models.head import Head
from puzzle_ray.models.shards import ModelShard, ShardedModel, in_this_process, runs_of_layers
from puzzle_ray.planning.evaluating import (
    bytes_per_logit,
    evaluation_demand,
    evaluation_phases,
    forward_bytes,
    sharded_demands,
)
from puzzle_ray.planning.sizes import Sizes
from puzzle_ray.profiling.batch_sizes import with_batch_sizes
from puzzle_ray.profiling.memory import peak_bytes, peak_of
from puzzle_ray.scoring.metrics import measures_of_heads
from puzzle_ray.variants.space import search_space

ON_LINUX = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")


def sizes_of(config):
    return Sizes(config, search_space(config, ("noop",), ("noop",), 8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_logit_costs_what_the_tensors_of_a_comparison_take(dtype, monkeypatch):
    monkeypatch.setitem(heads.CHUNK_ELEMENTS, "cpu", 1 << 16)
    one, other = (Head(torch.nn.Linear(8, 4096, bias=False, dtype=getattr(torch, dtype))) for _ in range(2))
    states, ids = torch.randn(1, 32, 8, dtype=getattr(torch, dtype)), torch.zeros(32, dtype=torch.long)
    with torch.inference_mode():
        held = peak_of(lambda: measures_of_heads(one, other, ids, states, states))
    assert bytes_per_logit(one, dtype) == held / (1 << 16)
    capped = Head(one.linear, softcap=30.0)
    assert bytes_per_logit(capped, dtype) >= bytes_per_logit(one, dtype)


def test_a_deeper_model_holds_no_more_activations_than_a_plan_counts():
    config = tiny_config(num_hidden_layers=5)
    deep = peak_bytes(lambda: new_child(config, [LayerChoice()] * 5, torch.float32).eval(), 3, 40)
    assert forward_bytes(sizes_of(config), "float32", 3, 40) == deep > 3 * 40 * 4 * config.intermediate_size


def test_phases_hold_what_the_code_has_in_memory_then():
    config = tiny_config(dtype="bfloat16", num_hidden_layers=4)
    sizes, tokens = sizes_of(config), 640
    how = {"evaluate": {"tokens": tokens, "micro_batch_tokens": 64}, "data": {"sequence_length": 32}}
    scenario = {"batch_size": 2, "input_tokens": 8, "output_tokens": 4}
    profile = {"scenario": scenario, "dtype": "float32", "batch_sizes": [1, 3]}
    phases = evaluation_phases(RunConfig(**how, profile=profile), sizes, 0, kept=0.5)
    own, head = 2 * sizes.total, 2 * config.vocab_size * config.hidden_size
    of_parent = {"parent's head": head, "parent's final states": tokens * config.hidden_size * 2}
    assert phases["the parent is read"].items() >= ({"one model": own} | of_parent).items()
    assert phases["a child is read"].items() >= ({"one model": own // 2} | of_parent).items()
    assert phases["the child is loaded"] == {"two models": int(1.5 * 2 * own), "its file": own // 2}
    cache = 3 * 12 * 4 * 2 * config.num_key_value_heads * config.head_dim * 4
    timed = phases["models are timed"]
    assert timed["two models"] == int(1.5 * 2 * own) and timed["KV cache"] == cache
    most = max(sum(phase.values()) for phase in evaluation_phases(RunConfig(**how, profile=profile), sizes, 0).values())
    assert evaluation_demand(RunConfig(**how, profile=profile), sizes, 0).total == most
    same = evaluation_phases(RunConfig(**how, profile=profile | {"dtype": "bfloat16"}), sizes, 0)
    assert "the child is loaded" not in same, "in its own dtype a model is its mapped file"
    on_gpu = RunConfig(**how, profile=profile | {"num_gpus": 1})
    assert set(evaluation_phases(on_gpu, sizes, 0)) == {"a child is read", "models are timed"}
    for room, together in ((6 * own, True), (4 * own, False)):
        assert ("two models" in evaluation_phases(on_gpu, sizes, room)["models are timed"]) == together


@ON_LINUX
def test_what_is_kept_of_the_parent_does_not_keep_its_file(tmp_path):
    folder = save_parent(tmp_path / "parent")
    parent = load_model(folder)
    with torch.inference_mode():
        reference = Reference(parent, [torch.zeros(1, 4, dtype=torch.long)])
    name = str(folder / "model.safetensors")
    assert name in Path("/proc/self/maps").read_text()
    assert torch.equal(reference.head.linear.weight, parent.lm_head.weight)
    del parent
    gc.collect()
    assert name not in Path("/proc/self/maps").read_text()


SCRIPT = """
import json, sys
import torch
from benchmarks.rehearsal import KINDS, idle_here
from puzzle_ray.config import RunConfig
from puzzle_ray.evaluation.comparison import Comparison
from puzzle_ray.evaluation.evaluate import evaluate
from puzzle_ray.progress import Quiet
from pathlib import Path
parent, child, settings = sys.argv[1:]
config, line = RunConfig.model_validate_json(settings), lambda: Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
idle = idle_here(KINDS["LoneWorker"][1], False, Path(parent))
Path("/proc/self/clear_refs").write_text("5")
ids = torch.randint(300, (config.evaluate.tokens // 64, 64), generator=torch.Generator().manual_seed(0))
batches = list(ids.split(config.evaluate.sequences(64)))
profile = config.profile
evaluate({"parent": parent, "child": child}, batches, Comparison(config.evaluate, profile.scenario, profile.dtype), Quiet())
print((int(line()) << 10) - idle)
"""
SHAPES = {
    "large vocabulary": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 131_072},
    "large body": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 4096},
}


@ON_LINUX
@pytest.mark.wide
@pytest.mark.parametrize("timed_in", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_process_grows_by_what_a_plan_says(tmp_path, name, timed_in):
    shape = SHAPES[name] | {"num_attention_heads": 8, "head_dim": 64, "num_key_value_heads": 4, "tie_word_embeddings": True}
    folders = [
        save_parent(tmp_path / word, seed=seed, dtype="bfloat16", **shape) for seed, word in enumerate(("parent", "child"))
    ]
    for folder in folders:
        load_model(folder, torch.bfloat16).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    settings = {
        "data": {"sequence_length": 64},
        "profile": {"scenario": {"batch_size": 1, "input_tokens": 64, "output_tokens": 4}, "dtype": timed_in},
        "evaluate": {"tokens": 512, "micro_batch_tokens": 256, "repeats": 1, "sample_tokens": 2},
    }
    words = [sys.executable, "-c", SCRIPT, *map(str, folders), json.dumps(settings)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert not done.returncode, done.stderr
    planned = evaluation_demand(RunConfig.model_validate(settings), sizes_of(read_config(folders[0])), 0).total
    assert int(done.stdout) == pytest.approx(planned, rel=0.1)


def test_shards_and_who_asks_them_hold_what_a_plan_says(tmp_path):
    """The weights to the byte, and the activations of a shard of as many layers as are counted."""
    shape = {
        "num_hidden_layers": 5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "hidden_size": 64,
        "intermediate_size": 256,
    }
    folder = save_parent(tmp_path, **shape)
    load_model(folder, torch.bfloat16).save_pretrained(folder)
    settings = {"num_shards": 2, "tokens": 640, "micro_batch_tokens": 256, "batch_tokens": 128, "window_tokens": 32}
    config = RunConfig.model_validate({"evaluate": settings, "data": {"sequence_length": 64}})
    found = {(d.stage, d.process): d for d in sharded_demands(config, sizes_of(read_config(folder)))}
    assert [d.count for d in found.values()] == [2, 1, 2, 1] and not any(d.gpu_share for d in found.values())
    for stage, dtype, ids in (("evaluation", torch.bfloat16, (4, 64)), ("quality", torch.float32, (4, 32))):
        shards = [ModelShard(layers) for layers in runs_of_layers(5, 2)]
        weights = [sum(p.nbytes for p in shard.load(str(folder), dtype).parameters()) for shard in shards]
        planned = found[stage, "shard"].parts
        assert planned["weights"] == max(weights) == weights[1]
        with torch.inference_mode():
            hidden = torch.randn(*ids, 64).to(dtype)
            held = peak_of(lambda: shards[1].run(str(folder), dtype, hidden, None))  # noqa: B023
        assert held <= planned["activations"] <= 2 * held
        model = ShardedModel(str(folder), in_this_process(2), dtype)
        worker = found[stage, "worker"].parts
        assert worker["ends of a model"] == sum(p.nbytes for p in model.ends.parameters())
    batches = [torch.zeros(4, 64, dtype=torch.long)] * 2 + [torch.zeros(2, 64, dtype=torch.long)]
    with torch.inference_mode():
        reference = Reference(ShardedModel(str(folder), in_this_process(2)), batches)
    worker = found["evaluation", "worker"].parts
    assert worker["parent's final states"] == sum(final.nbytes for final in reference.finals)
    assert worker["parent's head"] == reference.head.linear.weight.nbytes
    on_gpus = RunConfig.model_validate(config.model_dump(mode="json") | {"cluster": {"gpus_per_shard": 0.5}})
    beside = sharded_demands(on_gpus, sizes_of(read_config(folder)))[1]
    assert beside.host == {"parent's final states": worker["parent's final states"]}, "a GPU has no room for those of much text"
    assert set(beside.parts) == {"ends of a model", "parent's head", "logits"} and beside.gpu_share == 0.5
    with torch.inference_mode():
        ids = torch.zeros(4, 32, dtype=torch.long)
        logits = ShardedModel(str(folder), in_this_process(2), torch.float32)(ids, use_cache=False).logits
    assert found["quality", "worker"].parts["logits"] == 2 * logits.nbytes


def test_timing_counts_the_batch_size_that_auto_will_find():
    config = tiny_config(num_hidden_layers=4)
    sizes = sizes_of(config)
    profile = {"scenario": {"batch_size": "auto", "input_tokens": 32, "output_tokens": 16}, "max_batch_size": 64}
    each = 4 * 2 * config.num_key_value_heads * config.head_dim * 48 * 4
    for memory_mib, batch in ((1000.0, 64), (1.6, 16), (None, 1)):
        own = RunConfig.model_validate({"profile": profile | {"memory_mib": memory_mib}})
        if memory_mib:
            assert with_batch_sizes(own.profile, config, sizes.space, None).scenario.batch_size == batch
        assert evaluation_phases(own, sizes, 0)["models are timed"]["KV cache"] == batch * each
    on_gpu = RunConfig.model_validate({"profile": profile | {"num_gpus": 1}})
    assert evaluation_phases(on_gpu, sizes, 1 << 30)["models are timed"]["KV cache"] == 64 * each
    assert "lower profile.max_batch_size" in evaluation_demand(on_gpu, sizes, 1 << 30).remedy

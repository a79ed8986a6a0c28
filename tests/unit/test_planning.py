"""A plan's bytes are those of the real objects at small size, and hand arithmetic at the size of Llama-3.1-8B and Llama-3.3-70B."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from gkd_trainers import CONFIG as GKD
from gkd_trainers import new_trainer
from layer_trainers import SPACE, changed, run, trainer
from small_models import save_parent, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typer.testing import CliRunner

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.config import RunConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill.bld import LayerTrainer
from puzzle_ray.distill.gkd_trainer import GkdTrainer
from puzzle_ray.distill.range_test import MOST_TRIALS
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.blocks import LayerStack, load_stack
from puzzle_ray.models.child import new_child, read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.planning.block_training import calibration_bytes, trainer_parts
from puzzle_ray.planning.demand import Demand, Sizes, demands, works
from puzzle_ray.planning.distilling import worker_parts
from puzzle_ray.planning.hardware import CONTEXT_BYTES, Hardware, host_bytes, host_problems, problems, room_bytes
from puzzle_ray.profiling.nodes import Node
from puzzle_ray.variants.space import SpaceConfig, search_space

GIB = 1 << 30
LLAMA = {"vocab_size": 128_256, "max_position_embeddings": 131_072, "tie_word_embeddings": False, "dtype": "bfloat16"}
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
PARAMS = {"8B": 8_030_261_248, "70B": 70_553_706_496}  # as their model cards say


def llama(name):
    from transformers import AutoConfig

    return AutoConfig.for_model("llama", num_key_value_heads=8, **LLAMA, **SHAPES[name])


def planned(model_config, **settings):
    config = RunConfig.model_validate(settings)
    space = search_space(model_config, config.space.attention, config.space.ffn, config.space.ffn_multiple_of)
    sizes = Sizes(model_config, space)
    found = demands(config, model_config, sizes)
    return {(d.stage, d.process): d for d in found}, {w.stage: w for w in works(config, model_config, sizes)}, sizes


def test_a_block_trainers_bytes_are_those_of_its_tensors(parent_folder):
    config = read_config(parent_folder)
    sizes = Sizes(config, search_space(config, *SPACE, 8))
    real = trainer(parent_folder)
    run(real, range(real.schedule.calibrate + real.schedule.validate + 2))
    found = trainer_parts(sizes, 1)
    assert len(real.candidates) == 6
    variants = [v for c in real.candidates for v in c.weights().values()]
    assert found["variants"] == sum(v.nbytes for v in variants)
    assert found["start weights"] == sum(v.nbytes for c in real.candidates for v in c.start.values())
    moments = [slot for c in real.candidates if c.optimizer for state in c.optimizer.state.values() for slot in state.values()]
    assert found["optimizer"] == sum(slot.nbytes for slot in moments if slot.dim())
    trained = [sum(p.nbytes for p in c.parameters) for c in real.candidates]
    assert found["gradients"] == max(trained), "of one variant at a time"
    assert not any(p.grad is not None for c in real.candidates for p in c.parameters)
    kept = trainer(parent_folder, changed(gradient_accumulation=2))
    run(kept, range(kept.schedule.calibrate + kept.schedule.validate + 3))
    there = sum(p.grad.nbytes for c in kept.candidates for p in c.parameters)
    assert trainer_parts(sizes, 1, accumulate=2)["gradients"] == there == sum(trained), "they stay until the step ends"
    halves = [trainer(parent_folder, part=(n, 2)) for n in range(2)]
    for half in halves:
        run(half, range(half.schedule.calibrate))
    assert trainer_parts(sizes, 1, trainers=2)["variants"] == max(
        sum(v.nbytes for c in half.candidates for v in c.weights().values()) for half in halves
    )
    assert found["parent layer"] == sum(p.nbytes for p in real.layer.parameters())


@pytest.mark.parametrize("space", [SPACE, (("gqa:1",), ("ffn:24",)), (("noop",), ("ffn:24",)), (("noop",), ("noop",))], ids=str)
def test_a_calibrating_trainers_bytes_are_those_of_its_moments(parent_folder, space):
    config = read_config(parent_folder)
    sizes = Sizes(config, search_space(config, *space, 8))
    real = trainer(parent_folder, space=space)
    run(real, range(real.schedule.calibrate - 1))
    seen = real.statistics
    moments = [m for halves in seen.halves.values() for half in halves for m in (half.xx, half.xy)]
    found = sum(m.nbytes for m in (*moments, *seen.head_halves, *seen.channel_halves) if m is not None)
    assert calibration_bytes(sizes, 1, sizes.space.layers[1].trained) == found
    parts = trainer_parts(sizes, 1)
    later = parts["gradients"] + parts["optimizer"]
    assert later + parts.get("calibration", 0) == max(later, found)


def test_a_distilling_workers_bytes_are_those_of_its_tensors():
    real = new_trainer()
    child, parent = (sum(p.numel() for p in model.parameters()) for model in (real.child, real.parent))
    found = worker_parts(child, parent, "float32", RunConfig(gkd=GKD, data={"sequence_length": 16}), real.child.config)
    assert found["child"] == sum(p.nbytes for p in real.parameters.values())
    assert found["gradients"] == real.gradients.flat.nbytes
    assert found["optimizer"] == sum(
        real.optimizer.state[p][m].nbytes for p in real.parameters.values() for m in ("exp_avg", "exp_avg_sq")
    )
    assert found["parent"] == sum(p.nbytes for p in real.parent.parameters())


def test_a_shards_weights_are_those_of_the_loaded_one(parent_folder):
    config = read_config(parent_folder)
    found, _, sizes = planned(config, cluster={"num_shards": 2}, space={"attention": ("gqa:1",), "ffn": ("noop",)})
    stack = load_stack(parent_folder, describe(config), config, 1, 3, torch.float32)
    assert found["library", "parent shard"].parts["weights"] >= sum({p.data_ptr(): p.nbytes for p in stack.parameters()}.values())
    assert sizes.total == sum(
        {
            p.data_ptr(): p.numel() for p in load_stack(parent_folder, describe(config), config, 0, 3, torch.float32).parameters()
        }.values()
    )


class Products(TorchDispatchMode):
    """FLOPs of matrix products as torch counts them; those inside attention are left out."""

    def __init__(self):
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, kind = func(*args, **(kwargs or {})), func.overloadpacket
        if kind in flop_registry and "attention" not in str(kind):
            self.flops += flop_registry[kind](*args, **(kwargs or {}), out_val=out)
        return out


def products(work) -> float:
    with Products() as counted:
        work()
    return counted.flops


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_torch_counts_in_a_step(tied):
    """But for norms, which are no products: less than 1 %."""
    model_config = tiny_config(
        hidden_size=64, intermediate_size=256, vocab_size=500, num_hidden_layers=2, tie_word_embeddings=tied
    )
    tokens, kinds = 16, {"attention": ("gqa:1", "linear", "noop"), "ffn": ("ffn:128", "noop")}
    settings = {"library": {"tokens": tokens, "micro_batch_tokens": tokens}, "data": {"sequence_length": tokens}}
    gkd = {"tokens": tokens, "micro_batch_tokens": tokens, "num_workers": 1}
    _, work, sizes = planned(model_config, space=kinds, gkd=gkd, **settings)
    parent, child = (new_child(model_config, [LayerChoice()] * 2, torch.float32).eval() for _ in range(2))
    stack, trained = LayerStack(parent, describe(model_config), model_config, 0, 2), 0.0
    x = torch.randn(1, tokens, 64)
    for n in range(2):
        of = LayerTrainer(n, stack, sizes.space.layers[n], RunConfig.model_validate(settings).library.for_parent(model_config))
        with torch.no_grad():
            y = stack.run_layer(stack.layer(n), n, x)
        for position in range(of.schedule.positions):
            step = partial(of.step, position, x, y)
            trained += products(step) if of.schedule.phase(position)[0] == "train" else 0 * (step() or 0)
    forward = products(lambda: [stack.run_layer(stack.layer(n), n, x) for n in range(2)])
    assert trained + forward == pytest.approx(work["library"].flops, rel=0.01)
    text = Tokens(np.arange(4 * tokens, dtype=np.int32).reshape(4, tokens))
    trainer = GkdTrainer(child, parent, text, GkdConfig.model_validate(gkd), seed=0)
    assert products(trainer.step) == pytest.approx(work["gkd"].flops, rel=0.01)


@pytest.mark.parametrize("name", SHAPES)
def test_llamas_plan_is_what_hand_arithmetic_says(name):
    shape, n = SHAPES[name], PARAMS[name]
    layers, d, f, v = shape["num_hidden_layers"], shape["hidden_size"], shape["intermediate_size"], LLAMA["vocab_size"]
    space = SpaceConfig(attention=("parent", "noop"), ffn=("parent", "ffn:50%"))
    library = {
        "activation_dtype": "bfloat16",
        "parent_dtype": "bfloat16",
        "tokens": 10**9,
        "window": 3,
        "micro_batch_tokens": 4096,
    }
    cluster = {"num_shards": 4, "gpus_per_shard": 1, "gpus_per_trainer": 0.25}
    gkd = {"use_gpu": True, "num_workers": 8, "tokens": 10**9, "micro_batch_tokens": 4096}
    scoring = {"dtype": "bfloat16", "micro_batch_tokens": 4096}
    data = {"sequence_length": 4096}
    how = {"space": space.model_dump(), "library": library, "cluster": cluster, "gkd": gkd, "scoring": scoring, "data": data}
    found, work, sizes = planned(llama(name), **how)
    attention = 2 * d * d + 2 * d * 8 * (d // shape["num_attention_heads"])
    layer = attention + 3 * d * f + 2 * d
    assert sizes.total == n == layers * layer + 2 * v * d + d
    assert work["library"].store_bytes_per_token == (layers + 1) * d * 2
    assert work["library"].store_bytes == (layers + 1) * d * 2 * 4096 * 3
    half = 3 * d * (f // 2) + d  # the one trained variant: half of the FFN, with its norm
    trainer = found["library", "block trainer"]  # its GPU has no start weights, and no copies that a checkpoint is written from
    assert trainer.total - trainer.parts["activations"] == 4 * (layer + half * (1 + 1 + 2))
    assert trainer.host == {"start weights": 4 * half, "checkpoint copies": 4 * half * 3}
    more = planned(llama(name), **how | {"space": {"attention": ("parent", "noop"), "ffn": ("parent", "linear")}})[0]
    moments = 8 * 2 * 2 * (d + 1) * (2 * d + 1)  # X'X and X'Y of both subblocks, of either half of the tokens, in float64
    assert more["library", "block trainer"].parts["calibration"] == moments - 4 * (d * d + d) * (1 + 2)
    worker = found["gkd", "worker"].parts
    assert worker["child"] + worker["gradients"] + worker["optimizer"] == 16 * n and worker["parent"] == 2 * n
    ends = v * d
    products = n - ends - d  # the embedding and the final norm are none
    assert work["gkd"].flops == 8 * products * 1e9 and work["gkd"].checkpoint_bytes == 16 * n  # 12 and the best weights
    # the parent once, its attention once more in the trainers, and the variant: two passes of it
    assert work["library"].flops == layers * (2 * layer + 2 * (attention + d) + 6 * half) * 1e9
    shard = found["library", "parent shard"].parts
    assert shard["weights"] == 2 * (layers // 4 * layer + ends + d)  # the last one, with norm and head
    assert shard["hidden states"] == (layers // 4 + 1) * 4096 * d * 2

    hardware = Hardware.parse("8x8 H100-80GB")
    words = problems(list(found.values()), hardware)
    assert [line for line in words if line.startswith("gkd: a worker needs")], "16 bytes a parameter are more than one GPU has"
    again = {"activation_checkpointing": True}
    many = RunConfig.model_validate(how | {"gkd": gkd | {"parallel": "fsdp", "num_workers": 64} | again})
    sharded = demands(many, llama(name), sizes)[3]
    held = sum(sharded.parts[part] for part in ("child", "gradients", "optimizer", "best weights", "parent"))
    assert 22 * n <= 64 * held < 22 * n + 64 * 5, "16 bytes a parameter, 4 of the best weights, 2 of the parent"
    assert sharded.parts["gathered"] == 2 * (3 * (2 * ends + d) + 3 * layer) + 4 * ends and not problems([sharded], hardware)
    recomputed = works(many, llama(name), sizes)[-1].flops - work["gkd"].flops
    assert recomputed == 2 * layers * layer * 1e9, "a forward pass of the layers once more"
    assert hardware.hours(work["gkd"], 0.4) == pytest.approx(8 * products * 1e9 / (8 * 989.4e12 * 0.4) / 3600), "8 workers"


def test_gkds_workers_are_sharded_where_a_device_is_too_small():
    config = RunConfig(gkd={"use_gpu": True, "num_workers": 2, "tokens": 10**6}, data={"sequence_length": 16})
    small = tiny_config()
    sizes = Sizes(small, search_space(small, ("noop",), ("noop",), 8))
    held = 24 * sizes.total  # with the best weights and a float32 parent
    for memory, sharded in ((0, False), (2 * held, False), (2 * held - 2, True)):
        assert ("gathered" in demands(config, small, sizes, memory)[3].parts) == sharded, memory


def test_a_cluster_in_words():
    found = Hardware.parse("2x4 A100")
    assert (found.nodes, found.gpus, found.num_gpus) == (2, 4, 8)
    assert room_bytes(found, 0.5) == 40 * GIB - CONTEXT_BYTES
    for words in ("H100", "0x8 H100", "8x8", "2x4 cpu", "2x4 H999"):
        with pytest.raises(ConfigError):
            Hardware.parse(words)


def test_the_verb_prints_a_plan_and_starts_nothing(tmp_path):
    from jobs.app import application

    folder = save_parent(tmp_path / "parent", num_hidden_layers=4)
    (folder / "model.safetensors").unlink()  # nothing but the config is read
    words = ["plan", "--cluster", "1x2 H100", "--parent", str(folder), "--set", "cluster.gpus_per_shard=1"]
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(application(), [*words, "--store", str(tmp_path / "empty")])
    assert done.exit_code == 0, done.output
    rows = {
        line.split()[0]: line.split() for line in done.output.splitlines() if line[:7].strip() in ("library", "scores", "gkd")
    }
    assert rows["scores"][2] == "2" and float(rows["scores"][3]) >= 0
    for stage in ("library", "gkd"):  # their processes are given no GPU: what one could do in an hour is not what they do
        assert rows[stage][2:4] == ["none", "?"] and "how long CPUs take is not known" in done.output
    assert "block trainer" in done.output and "every process fits" in done.output and not list((tmp_path / "empty").iterdir())
    assert json.loads((folder / "config.json").read_text())


def test_a_shard_and_its_trainers_in_one_process_are_counted_together():
    model_config = tiny_config(num_hidden_layers=4)
    apart, together = (planned(model_config, parent="x", cluster={"num_shards": 2, "colocate": c})[0] for c in (False, True))
    shard, one_layer, both = (
        apart["library", "parent shard"],
        apart["library", "block trainer"],
        together["library", "shard, trainers"],
    )
    assert (shard.count, one_layer.count, both.count) == (2, 4, 2) and ("library", "block trainer") not in together
    transient = one_layer.parts["gradients"] + one_layer.parts["activations"]
    assert shard.total + 2 * one_layer.total - transient == both.total, "two layers each, one after the other"


def test_candidates_that_are_distilled_before_the_pick_are_counted():
    search = {"candidates": 2, "rivals": ["greedy"], "without": ["linear"], "local_search_steps": 1, "distil_tokens": 3000}
    gkd = {"use_gpu": True, "num_workers": 4, "tokens": 10_000, "micro_batch_tokens": 64}
    settings = {
        "gkd": gkd,
        "search": search,
        "data": {"sequence_length": 64},
        "space": {"attention": ["linear"], "ffn": ["noop"]},
    }
    found, work, sizes = planned(tiny_config(), **settings)
    candidate, worker = found["architecture", "candidate"], found["gkd", "worker"]
    assert candidate.count == 2 + 1 + 1 + 1 and candidate.gpu_share == 1
    assert candidate.parts == worker.parts, "a whole child each, with what trains it"
    assert work["architecture"].flops == 8 * (sum(sizes.layers) + sizes.head) * 3000 * 5 and work["architecture"].gpus == 5
    assert not problems([candidate], Hardware.parse("1x1 H100")), "those that find no GPU wait for their turn"
    tested = planned(tiny_config(), **settings | {"gkd": gkd | {"learning_rate": "auto"}})[1]
    trials = [MOST_TRIALS * 256 * steps for steps in (12, 20)]  # of 12 and of 40 steps in all
    assert tested["architecture"].flops == 8 * (sum(sizes.layers) + sizes.head) * (3000 + trials[0]) * 5
    assert tested["gkd"].flops == 8 * (sum(sizes.layers) + sizes.head) * (10_000 + trials[1])
    without = planned(tiny_config(), **settings | {"search": search | {"distil_tokens": 0}})
    assert ("architecture", "candidate") not in without[0] and "architecture" not in without[1]


def test_kinds_of_processes_that_run_together_share_the_gpus_and_the_hosts_memory():
    """Each kind alone would fit: 8 shards and 32 trainers of 8 GPUs each, 8 GiB and 9 GiB of a host of 16."""
    shard = Demand("library", "parent shard", 8, {"weights": GIB}, 1, "more shards", "fewer shards")
    trainer = Demand("library", "block trainer", 32, {"variants": GIB}, 0.25, "smaller batches", "fewer shards")
    hardware = Hardware.parse("1x8 H100-80GB")
    assert not problems([shard], hardware) and not problems([trainer], hardware)
    assert problems([shard, trainer], hardware) == [
        "library: 8 x parent shard and 32 x block trainer take 16 GPUs, the cluster has 8; fewer shards"
    ]
    assert not problems([shard, replace(trainer, stage="scores")], hardware), "stages do not run together"
    assert not problems([shard, replace(trainer, waits=True)], hardware)
    alone = [replace(shard, in_turn=True), replace(trainer, process="worker", count=1, gpu_share=1)]
    assert not problems(alone, Hardware.parse("1x1 H100-80GB")), "the one process that finds a GPU does the work of all"
    assert problems(alone, hardware), "shards, and who asks them"

    held = [replace(shard, gpu_share=0), replace(trainer, count=9, host={"copies": GIB})]
    node = Node(8, 16 * GIB)
    assert host_bytes(held) == {"library": 17 * GIB} and not host_problems(held, [node, node])
    assert host_problems(held, [node]) == [
        "library: 8 x parent shard and 9 x block trainer need 17.0 GiB of the hosts' memory together, the nodes have 16.0 GiB; "
        "smaller batches"
    ]
    assert not host_problems(held[:1], [node]) and not host_problems(held[1:], [node])
    assert "a parent shard needs 1.0 GiB of a host's memory" in host_problems(held[:1], [Node(8, GIB // 2)] * 99)[0]


def test_stages_of_gkd_are_planned_by_their_own_tokens_and_micro_batches():
    stages = [{"sequence_length": 64, "tokens": 640, "micro_batch_tokens": 64}]
    stages += [{"sequence_length": 256, "tokens": 2560, "micro_batch_tokens": 256}]
    gkd = {"num_workers": 1, "micro_batch_tokens": 64}
    staged, work, sizes = planned(tiny_config(), gkd=gkd | {"stages": stages}, data={"sequence_length": 64})
    whole, _, _ = planned(tiny_config(), gkd=gkd | {"micro_batch_tokens": 256, "tokens": 3200}, data={"sequence_length": 64})
    assert staged["gkd", "worker"].parts == whole["gkd", "worker"].parts, "what its longest micro-batch needs"
    assert work["gkd"].flops == 8 * (sum(sizes.layers) + sizes.head) * 3200

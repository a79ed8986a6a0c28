"""`hardware: auto`: the cluster decides what the config leaves open, what is set always holds, and what a run has decided stays."""

import json

import pytest
import torch
from small_models import tiny_config
from small_runs import make_run, save_parent_with_text
from typer.testing import CliRunner

import puzzle_ray.profiling.nodes as looked
from jobs.hardware import settled
from jobs.stages import gkd, library, scores
from puzzle_ray.config import RunConfig, load
from puzzle_ray.errors import ConfigError, StoreError
from puzzle_ray.models.blocks import stack_without_weights
from puzzle_ray.models.describe import describe
from puzzle_ray.pipeline import for_this_machine
from puzzle_ray.planning.activations import kept_bytes_per_token
from puzzle_ray.planning.demand import Sizes, demands
from puzzle_ray.planning.draft import IN_KEYS, value_of
from puzzle_ray.planning.hardware import Seen, problems
from puzzle_ray.planning.resolve import idle, powers, resolve
from puzzle_ray.planning.settled import note_of, settle
from puzzle_ray.profiling.nodes import GIB, Gpus, Node, nodes_of, this_machine
from puzzle_ray.recipes.shapes import published_config
from puzzle_ray.store import Store
from puzzle_ray.store.upkeep import collect_garbage
from puzzle_ray.variants.space import search_space

SMALL = tiny_config(num_hidden_layers=6, vocab_size=512)
CPUS = [Node(8, 32 * GIB)]
H100 = nodes_of("1x8 H100-80GB")
SPACE = {"attention": ["parent", "noop"], "ffn": ["parent", "ffn:50%", "noop"]}


def config(**settings):
    return RunConfig.model_validate(
        {"parent": "x", "hardware": "auto", "space": SPACE, "data": {"sequence_length": 256}} | settings
    )


def decided(asked, nodes, kept=None, model_config=SMALL):
    space = search_space(model_config, asked.space.attention, asked.space.ffn, asked.space.ffn_multiple_of)
    return resolve(asked, model_config, space, nodes, kept, dict.fromkeys(kept or {}, "before"))


def v100(count=4):
    return [Node(16, 64 * GIB, Gpus(count, "V100", 16 * GIB, bfloat16=False))]


def test_on_one_machine_without_gpus_nothing_that_a_key_has_is_decided_otherwise():
    for plain in (config(), load("tiny"), config(gkd={"preset": "none"})):
        found = decided(plain.model_copy(update={"hardware": "auto"}), CPUS, model_config=SMALL)
        assert {name: value_of(found.config, name) for name in IN_KEYS} == {name: value_of(plain, name) for name in IN_KEYS}
        assert found.config.hardware is None and not found.warnings
        for section in ("library", "scoring", "gkd", "profile"):
            assert getattr(found.config, section).identity() == getattr(plain, section).identity()
    assert decided(config(), CPUS).config.cluster.num_shards == 1


def test_what_is_set_holds_on_every_cluster():
    given = {
        "cluster": {"num_shards": 3, "gpus_per_shard": 0.25, "gpus_per_trainer": 0.25, "colocate": False},
        "library": {
            "parent_dtype": "float32",
            "activation_dtype": "float32",
            "compute_dtype": "float32",
            "micro_batch_tokens": 512,
            "learning_rate": 0.002,
        },
        "scoring": {"dtype": "float32", "micro_batch_tokens": 768},
        "gkd": {"use_gpu": True, "num_workers": 3, "micro_batch_tokens": 256, "gradient_accumulation": 5, "learning_rate": 0.01},
        "profile": {"num_gpus": 0, "dtype": "float32", "memory_mib": 1000.0},
    }
    for nodes in (H100, CPUS, v100(), nodes_of("2x1 H200")):
        found = decided(config(**given), nodes, {name: "never" for name in IN_KEYS})
        for section, settings in given.items():
            for name, value in settings.items():
                assert getattr(getattr(found.config, section), name) == value, (section, name)


def test_gpus_are_all_used_in_bfloat16_and_everything_fits():
    found = decided(config(), H100).config
    assert (found.cluster.num_shards, found.cluster.colocate) == (6, True), "a layer on each"
    assert found.cluster.gpus_per_shard + found.cluster.gpus_per_trainer == 1
    assert {found.library.compute_dtype, found.library.activation_dtype, found.scoring.dtype, found.profile.dtype} == {"bfloat16"}
    assert found.gkd.use_gpu and found.gkd.num_workers == 8 and found.gkd.learning_rate == "auto"
    assert found.library.micro_batch_tokens == 16_384 and found.profile.memory_mib == 81_559 and found.profile.num_gpus == 1
    apart = decided(config(cluster={"colocate": False}), nodes_of("1x2 H100")).config.cluster
    assert (apart.num_shards, apart.gpus_per_shard, apart.gpus_per_trainer) == (2, 0.25, 0.25), "three layers and a shard each"


def test_without_bfloat16_it_is_float32_and_said():
    found = decided(config(), v100())
    assert {found.config.library.compute_dtype, found.config.scoring.dtype, found.config.profile.dtype} == {"float32"}
    assert any("not all GPUs have bfloat16" in line for line in found.warnings)


def test_micro_batches_shrink_with_the_memory_until_nothing_helps():
    big = tiny_config(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, head_dim=128, num_hidden_layers=4)
    tokens = []
    for gib in (1024, 2, 1.05):  # the last one holds less than a layer beside a GPU's context
        found = decided(config(), [Node(gpus=Gpus(4, "card", int(gib * GIB)))], model_config=big)
        tokens.append(found.config.library.micro_batch_tokens)
        size = int(gib * GIB)
        assert bool(found.warnings) == bool(problems(_demands(found.config, big, size), Seen("card", size, 4)))
    assert tokens == [16_384, 8_192, 256]
    assert any("library: a shard, trainers needs" in line and "num_shards" in line for line in found.warnings)


def test_a_model_that_no_gpu_holds_is_measured_on_several_of_a_node():
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "head_dim": 128, "num_hidden_layers": 4}
    big = tiny_config(**wide, dtype="bfloat16")
    size = GIB + (200 << 20)  # a model takes 0.12 GiB, two are timed together, and a GPU's context takes 1 GiB
    little = {"evaluate": {"tokens": 512, "micro_batch_tokens": 256}}
    for count, expected in ((4, 2), (2, 2), (1, 0)):
        found = decided(config(**little), [Node(gpus=Gpus(count, "card", size))] * 2, model_config=big)
        assert found.config.profile.num_gpus == expected
        assert found.config.profile.memory_mib == (expected * size >> 20 or None)
        assert any("no node's GPUs hold it" in line for line in found.warnings) == (not expected)
    for own in (1, 4):  # the user's number says how much memory a child may take
        found = decided(config(profile={"num_gpus": own}), [Node(gpus=Gpus(4, "card", size))], model_config=big)
        assert (found.config.profile.num_gpus, found.config.profile.memory_mib) == (own, own * size >> 20)
    set_to_0 = decided(config(profile={"num_gpus": 0}), [Node(gpus=Gpus(4, "card", size))], model_config=big)
    assert set_to_0.config.profile.num_gpus == 0 and not any("profile" in line for line in set_to_0.warnings)


BIG = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "head_dim": 128,
    "num_hidden_layers": 24,
    "dtype": "bfloat16",
}


LITTLE = {  # what else is decided is said, for speed
    "evaluate": {"tokens": 512, "micro_batch_tokens": 256, "batch_tokens": 512},
    "library": {"micro_batch_tokens": 256},
    "scoring": {"micro_batch_tokens": 256},
    "gkd": {"tokens": 0},
}


def test_a_model_that_no_node_holds_is_evaluated_in_as_few_shards_as_have_room():
    big, little = tiny_config(**BIG), LITTLE
    nodes = [Node(gpus=Gpus(1, "card", 4 * GIB))] * 8
    asked = config(**little, cluster={"gpus_per_shard": 1, "gpus_per_trainer": 0})
    found = decided(asked, nodes, model_config=big)
    count = found.config.evaluate.num_shards
    (line,) = (line for line in found.lines if line.startswith("evaluate.num_shards"))
    assert count > 1 and "no node's GPUs hold a whole model" in line and "no speed is measured" in line
    assert not [words for words in found.warnings if words.startswith(("evaluation", "quality"))]

    def named(num_shards):
        own = found.config.evaluate.model_copy(update={"num_shards": num_shards})
        return {
            f"{d.stage}: {d.process}": d
            for d in _demands(found.config.model_copy(update={"evaluate": own}), big, 4 * GIB)
            if d.stage in ("evaluation", "quality")
        }

    assert not problems(list(named(count).values()), Seen("card", 4 * GIB, 8))
    words = problems(list(named(count - 1).values()), Seen("card", 4 * GIB, 8))
    assert words and all("raise evaluate.num_shards" in line for line in words)
    assert list(named(count)) == ["evaluation: shard", "evaluation: worker", "quality: shard", "quality: worker"]
    assert [demand.count for demand in named(count).values()] == [count, 1, count, 1]
    assert list(named(0)) == ["evaluation: worker"]
    said = little | {"evaluate": little["evaluate"] | {"num_shards": 3}}
    held = decided(config(**said, cluster=asked.cluster), nodes, model_config=big)
    assert held.config.evaluate.num_shards == 3, "what is set holds"
    enough = [Node(gpus=Gpus(4, "card", 4 * GIB))] * 2
    assert decided(asked, enough, model_config=big).config.evaluate.num_shards == 0, "a node's GPUs together hold it"
    estimated = config(**little, cluster=asked.cluster, profile={"engine": "roofline", "device": "H100"})
    assert decided(estimated, nodes, model_config=big).config.evaluate.num_shards == count, "whoever says what blocks cost"


def test_what_no_gpu_holds_is_evaluated_in_shards_where_a_cpu_would_read_it_whole():
    big, nodes = tiny_config(**BIG), [Node(gpus=Gpus(4, "card", 4 * GIB))]
    shared = {"gpus_per_shard": 1, "gpus_per_trainer": 0}
    for profile in ({"engine": "roofline", "device": "H100"}, {"num_gpus": 0}):
        found = decided(config(**LITTLE, cluster=shared, profile=profile), nodes, model_config=big)
        (line,) = (line for line in found.lines if line.startswith("evaluate.num_shards"))
        assert found.config.evaluate.num_shards > 1 and "no GPU holds a whole model, and nothing is measured on GPUs" in line
        held = [Node(gpus=Gpus(4, "card", 40 * GIB))]
        assert decided(config(**LITTLE, cluster=shared, profile=profile), held, model_config=big).config.evaluate.num_shards == 0


def test_where_one_process_finds_a_gpu_it_has_room_for_one_shard_at_a_time():
    big, asked = tiny_config(**BIG), config(**LITTLE, cluster={"gpus_per_shard": 1, "gpus_per_trainer": 0})
    found = decided(asked, [Node(gpus=Gpus(1, "card", 3 * GIB))], model_config=big)
    count = found.config.evaluate.num_shards
    assert count > 1 and any("one after the other in the one process that finds a GPU" in line for line in found.lines)
    assert not [words for words in found.warnings if words.startswith(("evaluation", "quality"))]


def test_without_gpus_too_where_no_nodes_memory_is_enough():
    big = tiny_config(**BIG)
    small = decided(config(**LITTLE), [Node(4, 5 * GIB)] * 3, model_config=big).config.evaluate
    assert small.num_shards > 1 and small.identity()["sharded"]
    assert any(
        "of the hosts' memory together" in words
        for words in decided(config(**LITTLE), [Node(4, GIB)] * 3, model_config=big).warnings
    )
    alone = decided(config(**LITTLE), [Node(4, 9 * GIB)], model_config=big).config.evaluate
    assert alone.num_shards == 0, "two models of 5.3 GiB in float32 are timed one after the other"


def _demands(found, model_config, gpu_bytes):
    space = search_space(model_config, found.space.attention, found.space.ffn, found.space.ffn_multiple_of)
    return demands(found, model_config, Sizes(model_config, space), gpu_bytes)


@pytest.mark.parametrize("gpus", range(1, 10))
def test_a_step_has_the_same_tokens_on_every_cluster(gpus):
    found = decided(config(gkd={"step_tokens": 65_536}), [Node(gpus=Gpus(gpus, "card", 80 * GIB))]).config.gkd
    assert found.num_workers * found.micro_batch_tokens * found.gradient_accumulation == 65_536 == found.step_tokens
    assert found.num_workers == max(n for n in (1, 2, 4, 8) if n <= gpus) and found.learning_rate == 3e-4
    on_cpus = decided(config(gkd={"step_tokens": 65_536}), CPUS * gpus).config.gkd
    assert on_cpus.num_workers * on_cpus.micro_batch_tokens * on_cpus.gradient_accumulation == 65_536


def test_a_step_that_does_not_add_up_is_refused():
    with pytest.raises(ConfigError, match="step_tokens=4096, and num_workers x .* is 2048; make them equal"):
        load(None, None, ("gkd.step_tokens=4096",))
    with pytest.raises(ConfigError, match="step_tokens=4096, and .* is 3072"):
        decided(config(gkd={"step_tokens": 4096, "num_workers": 3, "micro_batch_tokens": 1024}), H100)
    plain = load(None, None, ("gkd.step_tokens=2048",))
    assert plain.gkd.identity() == load().gkd.identity(), "what counts is what it is made of"


def test_sequences_longer_than_the_default_micro_batch_need_no_setting():
    asked = config(data={"sequence_length": 4096})
    for nodes in (CPUS, H100):
        found = decided(asked, nodes).config
        assert all(getattr(found, name).micro_batch_tokens % 4096 == 0 for name in ("library", "scoring", "gkd"))
    with pytest.raises(ConfigError, match="no multiple of data.sequence_length"):
        load(None, None, ("data.sequence_length=4096",))
    assert list(powers(96, 0, 400)) == [384, 192, 96] and list(powers(96, 192, 400)) == [384, 192, 96]
    assert list(powers(512, 0, 400)) == [512]


CLUSTERS = [CPUS, H100, v100(2), nodes_of("8x8 H100-80GB"), CPUS * 3]


@pytest.mark.parametrize("first", range(len(CLUSTERS)))
def test_what_one_cluster_decided_keeps_every_key_on_any_other(first):
    before = decided(config(), CLUSTERS[first])
    for nodes in CLUSTERS:
        after = decided(config(), nodes, before.noted)
        for section in ("library", "scoring", "gkd"):
            assert getattr(after.config, section).identity() == getattr(before.config, section).identity(), (section, nodes)
        assert after.config.cluster.library_identity() == before.config.cluster.library_identity()
        again = [line for line in after.lines if line.startswith("library.micro_batch_tokens")]
        assert all("as before" in line for line in again)
        gpus = Seen.of(nodes)
        if gpus and after.config.gkd.num_workers > gpus.num_gpus:
            assert after.config.gkd.min_workers == gpus.num_gpus


def test_a_store_keeps_what_its_first_run_decided(tmp_path):
    store, asked = Store(str(tmp_path / "store")), config()
    assert settle(config(hardware=None), SMALL, H100, store).config == config(hardware=None)
    looked_at = settle(asked, SMALL, H100, store, notes=False)
    assert looked_at.lines and not (tmp_path / "store").exists(), "a look writes nothing"
    first = settle(asked, SMALL, H100, store)
    assert first == looked_at and note_of(asked, store).facts()["cluster"] == "1 node of 8 x H100, 80 GiB each"
    later = settle(asked, SMALL, CPUS, store)
    assert later.config.library == first.config.library and later.config.gkd.identity() == first.config.gkd.identity()
    said = [line for line in later.lines if line.startswith("library.compute_dtype")]
    assert said == [
        "library.compute_dtype = bfloat16: as the first run in this store decided, on 1 node of 8 x H100, 80 GiB each; "
        f"{note_of(asked, store).name} keeps it"
    ]
    share = "cluster.gpus_per_shard = 1: as the first run in this store decided, on 1 node of 8 x H100, 80 GiB each; "
    assert [line for line in later.lines if line.startswith(share)]
    own = settle(config(library={"compute_dtype": "float32"}), SMALL, CPUS, store)
    assert own.config.library.compute_dtype == "float32" and own.config.library.parent_dtype == "bfloat16"
    assert settle(config(data={"sequence_length": 128}), SMALL, CPUS, store).config.library.compute_dtype == "float32"
    assert not collect_garbage(store, older_than_days=-1), "nobody's input, and needed all the same"


def test_what_the_first_run_did_not_use_or_was_told_is_left_to_later_ones(tmp_path):
    store = Store(str(tmp_path / "store"))
    without = config(gkd={"tokens": 0}, profile={"engine": "roofline", "device": "H100"}, library={"compute_dtype": "float32"})
    assert settle(without, SMALL, CPUS, store).config.library.compute_dtype == "float32"
    values = note_of(without, store).facts()["values"]
    assert "library.parent_dtype" in values and not {"library.compute_dtype", "gkd.use_gpu", "profile.dtype"} & values.keys()
    later = settle(config(), SMALL, H100, store)
    assert later.config.gkd.use_gpu and later.config.gkd.num_workers == 8, "no GKD was there to decide for"
    assert (later.config.profile.num_gpus, later.config.profile.dtype) == (1, "bfloat16")
    assert later.config.library.parent_dtype == "float32" and "the library" in later.warnings[-1]
    assert settle(config(), SMALL, CPUS, store).config.gkd.identity() == later.config.gkd.identity(), "it has a note of its own"
    apart = decided(config(gkd={"use_gpu": False}), H100).noted
    assert "library.compute_dtype" in apart and not [name for name in apart if name.startswith("gkd.")]


def test_the_librarys_rate_is_found_where_a_gpu_decides_what_a_step_is():
    for nodes, settings, rate in (
        (H100, {}, "auto"),
        (CPUS, {}, 1e-3),
        (H100, {"library": {"micro_batch_tokens": 512}}, 1e-3),
        (H100, {"library": {"learning_rate": 5e-4}}, 5e-4),
        (CPUS, {"library": {"learning_rate": "auto"}}, "auto"),
        (H100, {"cluster": {"gpus_per_shard": 0, "gpus_per_trainer": 0}}, 1e-3),
    ):
        assert decided(config(**settings), nodes).config.library.learning_rate == rate, settings
    older = {name: value for name, value in decided(config(), H100).noted.items() if name != "library.learning_rate"}
    assert decided(config(), H100, older).config.library.learning_rate == 1e-3, "a store whose first run did not find rates"


def test_a_profile_is_of_the_machine_that_is_there(tmp_path):
    store = Store(str(tmp_path / "store"))
    first, later = (settle(config(), SMALL, nodes_of(f"1x2 {name}"), store).config for name in ("H200", "H100-80GB"))
    assert first.library.identity() == later.library.identity()
    assert first.profile.memory_mib > later.profile.memory_mib == 81_559
    cpu = settle(config(), SMALL, CPUS, store).config.profile
    assert cpu.identity() == RunConfig().profile.identity() and cpu.memory() == {}


def test_workers_that_share_micro_batches_are_not_too_many():
    before = decided(config(), nodes_of("4x8 H100-80GB"))
    after = decided(config(), nodes_of("1x2 H100-80GB"), before.noted)
    assert (after.config.gkd.num_workers, after.config.gkd.min_workers) == (32, 2)
    assert not [line for line in after.warnings if line.startswith("gkd: 32 x worker")]
    asked = config(gkd={"num_workers": 32, "min_workers": 4})
    assert any("gkd: 4 x worker take 4 GPUs, the cluster has 2" in line for line in decided(asked, nodes_of("1x2 H100")).warnings)


def test_a_part_of_a_step_that_is_set_leaves_the_noted_ones_to_be_derived():
    before = decided(config(gkd={"step_tokens": 65_536}), H100).noted
    for own in ({"micro_batch_tokens": 16_384}, {"num_workers": 2}, {"step_tokens": 131_072}, {"gradient_accumulation": 16}):
        found = decided(config(gkd={"step_tokens": 65_536} | own), H100, before).config.gkd
        assert found.num_workers * found.micro_batch_tokens * found.gradient_accumulation == found.step_tokens
        assert {name: getattr(found, name) for name in own} == own
    unsaid = decided(config(), H100)
    found = decided(config(gkd={"step_tokens": 4096}), CPUS, unsaid.noted).config.gkd
    assert found.num_workers * found.micro_batch_tokens * found.gradient_accumulation == 4096 and found.learning_rate == 3e-4
    assert decided(config(gkd={"heldout_tokens": 0}), H100, unsaid.noted).config.gkd.learning_rate == 3e-4
    same = decided(config(gkd={"step_tokens": 65_536}), nodes_of("1x2 H100"), before).config.gkd
    assert same.identity() == decided(config(gkd={"step_tokens": 65_536}), H100).config.gkd.identity()


LONG = {"data": {"sequence_length": 4096}}
STAGES = ({"sequence_length": 4096, "tokens": 8192, "micro_batch_tokens": 4096},)


@pytest.mark.parametrize(
    "asked",
    [
        LONG | {"gkd": {"tokens": 0, "step_tokens": 131_072}},
        LONG | {"gkd": {"stages": STAGES, "step_tokens": 131_072}},
        LONG | {"cluster": {"gpus_per_shard": 0}},
        LONG | {"cluster": {"gpus_per_shard": 0, "gpus_per_trainer": 0}, "gkd": {"use_gpu": False}},
    ],
)
def test_what_nobody_reads_is_refused_on_no_device(asked):
    for nodes in (CPUS, H100):
        found = decided(config(**asked), nodes)
        assert all(getattr(found.config, name).micro_batch_tokens % 4096 == 0 for name in ("library", "scoring", "gkd"))
        decided(config(**asked), CPUS, found.noted)
        decided(config(**LONG, gkd={"step_tokens": 16_384}), CPUS, found.noted)


def test_trainers_that_are_to_have_processes_of_their_own_have_them():
    two = decided(config(cluster={"trainers_per_layer": 2}), H100).config.cluster
    assert (two.colocate, two.num_shards, two.trainers_per_layer) == (False, 6, 2)
    assert two.gpus_per_shard == two.gpus_per_trainer == pytest.approx(1 / 3), "two trainers and a shard"
    joined = decided(config(cluster={"blocks_per_trainer": 4}), nodes_of("1x1 H100")).config.cluster
    assert (joined.colocate, joined.num_shards, joined.blocks_per_trainer) == (False, 1, 4)
    assert joined.gpus_per_trainer == pytest.approx(1 / 3), "six layers are two trainers'"


@pytest.mark.parametrize("verb", ["compress", "serial"])
def test_a_store_that_cannot_be_written_is_told_before_anything_is_decided(verb, tmp_path, monkeypatch):
    from jobs.app import application
    from puzzle_ray import compress

    (tmp_path / "file").write_text("no folder")
    place, run = str(tmp_path / "file" / "store"), CliRunner().invoke
    monkeypatch.setattr("puzzle_ray.planning.settled.do_once", lambda *what: pytest.fail("it waits for the store for ever"))
    if verb == "serial":
        with pytest.raises(StoreError, match="cannot be written"):
            compress(recipe="tiny", store=place, settings={"hardware": "auto"})
        return
    said = [
        str(run(application(), ["compress", "--recipe", "tiny", "--store", place, "--set", f"hardware={hardware}"]).exception)
        for hardware in ("auto", "null")
    ]
    assert said[0] == said[1] and "cannot be written" in said[0]


def test_a_cluster_in_words_takes_the_place_of_a_look(tmp_path):
    in_words = settle(config(hardware="1x8 H100-80GB"), SMALL, [], Store(str(tmp_path)), notes=False)
    assert in_words.config == settle(config(), SMALL, H100, None).config
    assert nodes_of("1x8xH100-80GB") == H100
    parent = save_parent_with_text(tmp_path / "parent")
    with pytest.raises(ConfigError, match="cluster.autoscaling adds others; write what will be there"):
        settled(make_run(parent, tmp_path, "hardware=auto", "cluster.autoscaling=true"), notes=False)
    for wrong in ("many", "1x8 H999", "0x8 H100", "999999999999x8 H100", "8x20000 H100"):
        with pytest.raises(ConfigError, match="hardware: .*write auto, or nodes x GPUs"):
            load(None, None, (f"hardware='{wrong}'",))


def test_gpus_that_nobody_asks_for_are_a_warning():
    assert idle(load(), 0) == [] and idle(decided(config(), H100).config, 8) == []
    (line,) = idle(load(), 8)
    settings = "cluster.gpus_per_shard, cluster.gpus_per_trainer, gkd.use_gpu"
    assert line == f"8 GPUs are idle while the library, scoring, GKD compute on CPUs; set {settings}, or hardware: auto"
    (line,) = idle(load(None, None, ("cluster.gpus_per_shard=0.5", "cluster.gpus_per_trainer=0.5")), 8)
    assert line == "8 GPUs are idle while GKD computes on CPUs; set gkd.use_gpu, or hardware: auto"


def test_a_run_with_auto_finds_what_one_without_has_done(tmp_path, monkeypatch):
    monkeypatch.setattr(looked, "probe_gpus", lambda hidden_by_ray: None)
    parent = save_parent_with_text(tmp_path / "parent")
    plain, auto = make_run(parent, tmp_path / "store"), make_run(parent, tmp_path / "store", "hardware=auto")
    auto = settled(auto, notes=False, quiet=True)
    assert auto.decided[0].startswith("hardware: found 1 node of") and not (tmp_path / "store").exists()
    for name in ("tokens", "profile"):
        assert auto.artifact(name).key == plain.artifact(name).key
    for stage in (library, scores, gkd):
        assert stage.settings(auto) == stage.settings(plain)


def test_without_ray_this_machine_decides_and_its_gpus_do_not_count(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(looked, "probe_gpus", lambda hidden_by_ray: pytest.fail("this process computes on the CPU"))
    folder, _ = save_parent_with_text(tmp_path / "parent")
    asked = load(None, None, (f"parent={folder}", "hardware=auto", "data.sequence_length=16"))
    found = for_this_machine(asked, Store(str(tmp_path / "store")))
    assert found.hardware is None and found.library == load(None, None, ("data.sequence_length=16",)).library
    assert "hardware: found 1 node of" in capsys.readouterr().err and list((tmp_path / "store").glob("hardware-*/artifact.json"))


def test_status_and_config_show_what_is_decided(tmp_path, monkeypatch):
    import yaml

    from jobs.app import application

    monkeypatch.setattr(looked, "probe_gpus", lambda hidden_by_ray: None)
    folder, _ = save_parent_with_text(tmp_path / "parent")
    words = [
        "--parent",
        str(folder),
        "--set",
        "hardware=auto",
        "--store",
        str(tmp_path / "store"),
        "--set",
        "data.sequence_length=16",
    ]
    (tmp_path / "store").mkdir()
    status = CliRunner().invoke(application(), ["status", *words, "--data", str(folder / "text.txt")])
    assert status.exit_code == 0, status.output
    assert "hardware: cluster.num_shards = 1: one for each node" in status.output and "library" in status.output
    shown = CliRunner().invoke(application(), ["config", "--resolved", "--cluster", "1x8 H100-80GB", *words])
    found = RunConfig.model_validate(yaml.safe_load(shown.stdout))
    assert found.hardware is None and found.gkd.num_workers == 8 and found.library.compute_dtype == "bfloat16"
    again = CliRunner().invoke(application(), ["config", "--resolved", *words])
    assert RunConfig.model_validate(yaml.safe_load(again.stdout)).gkd.num_workers == 1
    assert not list((tmp_path / "store").iterdir())
    refused = CliRunner().invoke(application(), ["config", "--cluster", "1x8 H100", *words])
    assert "add --resolved" in str(refused.exception)


def test_this_machine_says_what_it_has(monkeypatch):
    machine = this_machine(gpus=False)
    assert machine.cpus >= 1 and machine.memory_bytes > GIB and machine.gpus is None

    class Done:
        stdout = "a warning\n" + json.dumps([["NVIDIA A10G", 24 * GIB, 8], ["Tesla T4", 16 * GIB, 7]]) + "\n"

    monkeypatch.setattr(looked.os.path, "exists", lambda path: True)
    monkeypatch.setattr(looked.subprocess, "run", lambda *args, **how: Done)
    assert looked.probe_gpus(True) == Gpus(2, "Tesla T4", 16 * GIB, bfloat16=False), "what holds for both"


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("half", [False, True])
def test_what_a_layer_keeps_for_the_backward_pass_is_what_autograd_keeps(model_type, half):
    shape = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    model_config = tiny_config(model_type, **shape, num_hidden_layers=1, max_position_embeddings=512)
    model_config._attn_implementation = "sdpa"
    stack, _ = stack_without_weights(describe(model_config), model_config, 0, 1, torch.float32)
    layer, tokens = stack.layer(0).to_empty(device="cpu"), 128
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    x, rotary = torch.randn(1, tokens, 256, requires_grad=True), torch.randn(1, tokens, 32)
    how = torch.autocast("cpu", dtype=torch.bfloat16, enabled=half)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), how:
        layer(x, position_embeddings=(rotary, rotary), attention_mask=None)
    copies = 2 * sum(parameter.numel() for parameter in layer.parameters()) if half else 0
    measured = (sum(size for size, _ in kept.values()) - copies) / tokens
    assert kept_bytes_per_token(layer, 256, 2 if half else 4) == pytest.approx(measured, rel=0.2)


def test_published_shapes_have_the_parameters_of_their_model_cards():
    sizes = {"meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248, "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496}
    for parent, num_params in sizes.items():
        model_config = published_config(parent)
        assert Sizes(model_config, search_space(model_config, ("noop",), ("noop",), 256)).total == num_params
    assert published_config("org/other") is None

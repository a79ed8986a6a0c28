"""A model whose layers lie in shards is evaluated as a whole one is: the same figures to the bit, and no speed."""

import gc
import weakref

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from packed_text import SEPARATOR, packed_ids
from small_models import save_parent
from small_runs import make_run, save_parent_with_text

from jobs.stages import evaluation, quality
from puzzle_ray.artifacts import LayerChoice, Scenario
from puzzle_ray.evaluation.comparison import Comparison
from puzzle_ray.evaluation.evaluate import Models, ShardedModels, evaluate, evaluate_in_shards, greedy_sample, predictions
from puzzle_ray.evaluation.reader import Reader
from puzzle_ray.evaluation.requests import Continuations, Likelihoods, Predictions
from puzzle_ray.evaluation.settings import EvaluateConfig
from puzzle_ray.models.blocks import CPU
from puzzle_ray.models.child import load_model, new_child, read_config, save_child
from puzzle_ray.models.head import final_states
from puzzle_ray.models.shards import ModelShard, ShardedModel, in_this_process, own_dtype, runs_of_layers
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.downstream import Question, answer_questions, question_batches

MIXED = [LayerChoice("gqa:1", "ffn:24"), LayerChoice("noop", "linear"), LayerChoice("linear", "noop"), LayerChoice("window:5")]
MODELS = {
    "llama, untied": ("llama", {"tie_word_embeddings": False}, MIXED),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, MIXED),
    "gpt2": ("gpt2", {}, MIXED),
    "opt": ("opt", {}, MIXED),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 2]]}, MIXED[:3] + [LayerChoice()]),
    "gemma3": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 2}, [*MIXED[:3], LayerChoice()]),
    "granite": ("granite", {}, MIXED),
    "without a table": ("seed_oss", {}, MIXED),
}
SCENARIO = Scenario(batch_size=2, input_tokens=4, output_tokens=2)
QUESTIONS = [Question(f"is {n} even", ("yes it is", "no"), n % 2) for n in range(5)]


@pytest.fixture(scope="module", params=MODELS)
def folders(request, tmp_path_factory):
    """A parent and a mixed child of it."""
    family, changes, choices = MODELS[request.param]
    root, size = tmp_path_factory.mktemp("models"), {"num_hidden_layers": 4, "vocab_size": VOCAB_SIZE}
    parent = save_parent(root / "parent", family, **(size | changes))
    byte_tokenizer().save_pretrained(parent)
    torch.manual_seed(1)
    save_child(new_child(read_config(parent), choices, torch.float32), parent, root / "child")
    return {"parent": str(parent), "child": str(root / "child")}


@pytest.mark.parametrize("separator", [None, SEPARATOR])
def test_figures_and_states_are_the_whole_models_bit_for_bit(folders, separator):
    batches = [packed_ids(2, 24), packed_ids(3, 24)[1:], packed_ids(1, 24)]
    whole = predictions(Models(folders, [CPU]), batches, separator=separator)
    for num_shards in (1, 3):
        sharded = ShardedModels(folders, in_this_process(num_shards), CPU)
        assert predictions(sharded, batches, separator=separator) == whole
    assert whole["child"]["kl"] > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_parent_in_bfloat16_and_a_child_in_float32_are_each_read_in_their_own(family, tmp_path):
    parent = save_parent(tmp_path / "parent", family, num_hidden_layers=4)
    save_child(new_child(read_config(parent), MIXED, torch.float32), parent, tmp_path / "child")
    load_model(parent, torch.bfloat16).save_pretrained(parent)
    folders, batches = {"parent": str(parent), "child": str(tmp_path / "child")}, [packed_ids(2, 24)]
    sharded = ShardedModels(folders, in_this_process(2), CPU)
    assert [sharded[name].dtype for name in folders] == [torch.bfloat16, torch.float32]
    assert predictions(sharded, batches) == predictions(Models(folders, [CPU]), batches)


@torch.inference_mode()
def test_text_and_answers_are_the_whole_models(folders):
    tokenizer = byte_tokenizer()
    batches = question_batches(QUESTIONS, tokenizer, 64)
    for folder in folders.values():
        whole, sharded = load_model(folder), ShardedModel(folder, in_this_process(2))
        assert answer_questions(sharded, batches) == answer_questions(whole, batches)
        assert greedy_sample(sharded, tokenizer, "ab", 6) == greedy_sample(whole, tokenizer, "ab", 6)
        ids = packed_ids(1, 9)
        assert torch.equal(sharded(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)
        assert torch.equal(final_states(sharded, ids), final_states(whole, ids))
        assert sharded.generation_config.to_dict() | {"use_cache": None} == whole.generation_config.to_dict() | {
            "use_cache": None
        }


def test_readers_answer_as_those_of_whole_models(folders):
    chunks = [
        Likelihoods((((1, 2, 3), (4, 5)), ((1, 2, 3), (4, 6)), ((7,), (8, 9, 10)))),
        Predictions(packed_ids(3, 12).numpy(), SEPARATOR),
        Continuations(((5, 6, 7), (8, 9), (10, 11, 12, 13)), 5),
        Continuations(((5, 6, 7), (8, 9)), 5, temperature=1.0, top_p=0.9),
    ]
    whole, sharded = (Reader(folders["child"], 30, layers_of=layers_of) for layers_of in (None, in_this_process(3)))
    for chunk in chunks:
        one, other = whole.answer(chunk), sharded.answer(chunk)
        assert one.keys() == other.keys()
        assert all((one[name] == other[name]).all() for name in one), chunk
    model, text = load_model(folders["child"]), [5, 6, 7]
    while len(text) < 8:
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    assert whole.answer(chunks[2])["ids"][0].tolist() == text[3:]


@pytest.mark.parametrize("folders", ["llama, tied"], indirect=True)
def test_an_evaluation_in_shards_has_all_but_speeds(folders):
    batches = [packed_ids(2, 24)]
    config = EvaluateConfig(tokens=48, repeats=1, prompt="ab", sample_tokens=4)
    questions = question_batches(QUESTIONS, byte_tokenizer(), 64)
    how = Comparison(config, SCENARIO, "bfloat16", questions=questions)
    whole = evaluate(folders, batches, how, Quiet())
    found = evaluate_in_shards(folders, batches, how, Quiet(), in_this_process(2), 2)
    assert found["samples"] == whole["samples"] and found.keys() == whole.keys() | {"not_measured"}
    for name, figures in found["models"].items():
        timed = {key for key in whole["models"][name] if key.endswith(("_ms", "_per_s"))} | {"measured_speedup"}
        assert len(timed) == 7 and figures == {k: v for k, v in whole["models"][name].items() if k not in timed} | {
            "measured_speedup": None
        }
    assert found["measured_speedup"] is None and found["measured_by"] == found["not_measured"]
    assert found["not_measured"] == "not measured: the model is spread over 2 shards"


def test_one_shard_is_in_memory_at_a_time_and_reads_its_own_layers_alone(tmp_path, monkeypatch):
    folder = str(save_parent(tmp_path, num_hidden_layers=5))
    held, most = set(), []
    load, drop = ModelShard.load, ModelShard.drop

    def loaded(self, *what):
        stack = load(self, *what)
        assert len(stack.layers) == len(self.layers) and stack.embedding is stack.head is stack.final_norm is None
        held.add(self)
        most.append(len(held))
        return stack

    monkeypatch.setattr(ModelShard, "load", loaded)
    monkeypatch.setattr(ModelShard, "drop", lambda self: (held.discard(self), drop(self)))
    model = ShardedModel(folder, in_this_process(3))
    list(model.final_states([packed_ids(1, 8)] * 2, [None] * 2))
    assert max(most) == 1 and not held and len(most) == 6
    assert not any(".layers." in name for name, _ in model.ends.named_parameters())
    assert {p.device for p in model.ends.parameters()} == {CPU}
    embedding = weakref.ref(model.ends.get_input_embeddings().weight)
    gc.disable()
    try:
        del model
        assert embedding() is None, "what is at the ends goes before the next model's comes"
    finally:
        gc.enable()


def test_a_shard_takes_the_layers_of_whichever_model_is_asked(tmp_path):
    one, other = (str(save_parent(tmp_path / str(seed), seed=seed)) for seed in range(2))
    shard, hidden = ModelShard(range(1, 3)), torch.randn(1, 4, 32)
    first, second = (shard.run(folder, torch.float32, hidden, None) for folder in (one, other))
    assert not torch.equal(first, second) and torch.equal(shard.run(one, torch.float32, hidden, None), first)
    assert shard.run(one, torch.bfloat16, hidden.bfloat16(), None).dtype == torch.bfloat16


def test_layers_are_cut_into_equal_runs_and_dtypes_are_the_folders_own(tmp_path):
    assert runs_of_layers(7, 3) == [range(0, 2), range(2, 4), range(4, 7)] and len(runs_of_layers(2, 9)) == 2
    folder = save_parent(tmp_path / "one")
    load_model(folder, torch.bfloat16).save_pretrained(folder)
    config = read_config(folder)
    assert own_dtype(folder, config) == torch.bfloat16 == ShardedModel(str(folder), in_this_process(1)).dtype
    config.dtype = None
    assert own_dtype(folder, config) == torch.bfloat16, "of the first tensor"


def test_a_key_has_whether_layers_lie_in_shards_and_not_in_how_many(tmp_path):
    parent = save_parent_with_text(tmp_path / "parent")

    def settings(*overrides):
        run = make_run(parent, tmp_path / "store", *overrides)
        return evaluation.settings(run), quality.settings(run)

    plain = settings()
    assert "sharded" not in str(plain) and "num_shards" not in str(plain) and "cluster" not in plain[0]
    two, three = settings("evaluate.num_shards=2"), settings("evaluate.num_shards=3")
    assert two == three and all(one != other for one, other in zip(two, plain, strict=True))
    on_gpu = settings("evaluate.num_shards=2", "cluster.gpus_per_shard=0.5")
    assert on_gpu[0] != two[0] and settings("cluster.gpus_per_shard=0.5")[0] == plain[0]

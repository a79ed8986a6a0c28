"""Distillation with `data.document_mask`, what the mask costs, which keys it stands in, and where it is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gkd_processes import group, save_models
from gkd_trainers import CONFIG, new_parent, new_trainer, random_child
from packed_text import SEPARATOR, one_by_one, packed_ids
from small_models import save_parent, tiny_config
from small_runs import SMALL, make_run, save_parent_with_text
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from jobs.stages import evaluation, gkd, quality, scores
from jobs.stages import library as library_stage
from puzzle_ray.config import RunConfig
from puzzle_ray.data.order import Tokens
from puzzle_ray.data.packing import masked_by, positions_in_documents
from puzzle_ray.data.splits import TOKENS
from puzzle_ray.distill.child_loss import layer_outputs
from puzzle_ray.distill.gkd import CHILD, GkdJob, load_gkd_trainer
from puzzle_ray.distill.gkd_trainer import GkdTrainer
from puzzle_ray.distill.guard import heldout_losses
from puzzle_ray.distill.losses import cosine_distance
from puzzle_ray.distill.recomputing import recompute_layers
from puzzle_ray.distill.sharding import Shards
from puzzle_ray.errors import ConfigError, DataError
from puzzle_ray.families.registry import families
from puzzle_ray.models import packed
from puzzle_ray.models.child import load_model, save_child
from puzzle_ray.models.head import final_states
from puzzle_ray.models.masks import mask_bytes_per_token
from puzzle_ray.pipeline import compress
from puzzle_ray.planning.demand import Sizes, demands, works
from puzzle_ray.planning.evaluating import evaluation_phases
from puzzle_ray.progress import Quiet
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

TEXT = Tokens(packed_ids(40, 16, vocab_size=64).numpy().astype(np.int32), separator=SEPARATOR)


def models():
    parent = new_parent()
    return random_child(parent), parent


def by_document(config=CONFIG):
    return GkdTrainer(*models(), TEXT, config, seed=3)


def test_the_loss_of_distillation_is_that_of_documents_one_by_one():
    trainer = by_document(CONFIG.model_copy(update={"lm_weight": 0.5}))
    ids = trainer.text.batch(0, 0)

    def states(model):
        def run(alone):
            with layer_outputs(model) as outputs:
                final = final_states(model, alone)
            return torch.cat([*outputs, final], dim=-1)

        return one_by_one(run, ids).chunk(4, dim=-1)

    with torch.no_grad():
        (*child_layers, child), (*parent_layers, parent) = states(trainer.child), states(trainer.parent)
        own, other = (model.lm_head(final).log_softmax(-1) for model, final in ((trainer.child, child), (trainer.parent, parent)))
        kl = float((other.exp() * (other - own)).sum(-1).mean())
        cosine = float(cosine_distance(child_layers, parent_layers))
        lm = float(F.nll_loss(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        looked = heldout_losses(trainer.child, trainer.parent, ids, trainer._states)
    assert float(looked[0].mean()) == pytest.approx(kl, rel=1e-4) and float(looked[1].mean()) == pytest.approx(lm, rel=1e-4)
    row = trainer.step()
    assert (row.kl, row.cosine, row.lm) == pytest.approx((kl, cosine, lm), rel=1e-4)
    assert row.loss == pytest.approx(kl + cosine + 0.5 * lm, rel=1e-4)
    crossing = GkdTrainer(*models(), replace(TEXT, separator=None), CONFIG, seed=3).step()
    assert abs(crossing.kl - kl) > 1e-3 * kl


def test_its_gradient_is_that_of_documents_one_by_one():
    """Of the same documents in rows of their own, and packed two to a row."""
    alone = np.random.default_rng(0).integers(1, 64, (8, 8)).astype(np.int32)
    alone[:, 0] = SEPARATOR
    found = []
    for rows in (alone, alone.reshape(4, 16)):
        text = Tokens(rows, rows=np.arange(len(rows)), separator=SEPARATOR)  # in their order
        trainer = GkdTrainer(*models(), text, CONFIG.model_copy(update={"tokens": 64}), seed=3)
        row = trainer.step()
        found.append(((row.kl, row.cosine, row.gradient_norm), trainer.gradients.flat.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-3)


def test_layers_that_are_run_again_and_held_out_text_are_read_by_document():
    plain, again, crossing = by_document(), by_document(), new_trainer()
    recompute_layers(again.child)
    for trainer in (plain, again, crossing):
        trainer.watch(TEXT.first(64, 2))
        trainer.guard.look(0)
    assert plain.step() == again.step() and plain.guard.rows == again.guard.rows
    assert crossing.guard.rows[0].kl != plain.guard.rows[0].kl


def test_sharded_weights_too(tmp_path):
    with group(tmp_path, 0, 1):
        save_models(tmp_path, True)
        shards, folder = Shards(torch.device("cpu")), tmp_path / "child"
        plain, sharded = load_model(folder), shards.load(folder, torch.float32)
        ids = TEXT.first(32, 2)[0]
        position_ids = positions_in_documents(ids, SEPARATOR)
        with torch.no_grad():
            found = shards.states(sharded, ids, position_ids)
            assert torch.equal(found, final_states(plain, ids, position_ids))
            assert not torch.equal(found, shards.states(sharded, ids))


def test_a_job_says_what_its_documents_begin_with(tmp_path):
    store = Store(str(tmp_path / "store"))
    child, data = store.artifact("child", {}, {}), store.artifact("tokens", {}, {})
    save_models(tmp_path, True)
    with child.folder_to_publish(CHILD) as folder:
        save_child(load_model(tmp_path / "child"), tmp_path / "parent", folder)
    data.write_tensors(TOKENS, {"train": torch.from_numpy(TEXT.sequences), "heldout": torch.from_numpy(TEXT.sequences[:8])})
    found = []
    for separator in (None, SEPARATOR):
        artifact = store.artifact("gkd", {"mask": separator is not None}, {})
        held = tuple(ids.numpy() for ids in TEXT.first(64, 2))
        job = GkdJob(str(tmp_path / "parent"), child, data, artifact, CONFIG, 3, heldout=held, separator=separator)
        found.append(load_gkd_trainer(job))
        found[-1].guard.look(0)
    assert found[1].step() == by_document().step() != found[0].step()
    assert found[0].guard.rows != found[1].guard.rows


# --- what it costs


def test_what_autograd_keeps_more_with_masks_is_what_a_plan_counts():
    config = tiny_config(num_hidden_layers=2)
    config._attn_implementation = "sdpa"
    model, ids, kept = LlamaForCausalLM(config).float(), packed_ids(2, 30), []
    for position_ids in (None, positions_in_documents(ids, SEPARATOR)):
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            final_states(model, ids, position_ids)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))
    assert kept[1] - kept[0] == pytest.approx(ids.numel() * mask_bytes_per_token(config, 30, 4, 2), rel=0.1)
    assert mask_bytes_per_token(config, 0, 4) == 0


def test_a_plan_counts_them_where_documents_are_masked():
    small = tiny_config()
    sizes, gkd_settings = Sizes(small, search_space(small, ("noop",), ("noop",), 8)), {"tokens": 640, "micro_batch_tokens": 64}
    off, on = (RunConfig(data={"document_mask": mask, "sequence_length": 32}, gkd=gkd_settings) for mask in (False, True))
    plain, masked = ({(d.stage, d.process): d.parts for d in demands(config, small, sizes)} for config in (off, on))
    assert not any("attention masks" in parts for parts in plain.values())
    repeated = 2 * 2 * 8  # keys and values of two heads more
    assert masked["gkd", "worker"]["attention masks"] == 64 * (2 * 32 + 3 * 4 * (32 + repeated))
    one_layer = 2048 * (2 * 32 + 4 * (32 + repeated))
    for process in (("library", "parent shard"), ("library", "block trainer")):
        assert masked[process] == plain[process] | {"attention masks": one_layer}
    wide = tiny_config(intermediate_size=512)  # where a forward pass of the evaluation holds more than its logits
    wide_sizes = Sizes(wide, search_space(wide, ("noop",), ("noop",), 8))
    without, with_masks = (evaluation_phases(config, wide_sizes, 0)["a child is read"] for config in (off, on))
    assert with_masks == {**without, "attention masks": one_layer}
    small_works = [{w.stage: w for w in works(settings, small, sizes)} for settings in (off, on)]
    before, after = (found["library"] for found in small_works)
    assert after.store_bytes_per_token == before.store_bytes_per_token + 4 and after.flops == before.flops
    stages = [{"sequence_length": 512, "tokens": 1024, "micro_batch_tokens": 512}]
    longer = RunConfig(
        data={"document_mask": True, "sequence_length": 32},
        gkd=gkd_settings | {"stages": stages},
        search={"candidates": 2, "distil_tokens": 640},
    )
    found = {(d.stage, d.process): d.parts.get("attention masks") for d in demands(longer, small, sizes)}
    assert found["gkd", "worker"] == 512 * (2 * 512 + 3 * 4 * (512 + repeated))
    assert found["architecture", "candidate"] == masked["gkd", "worker"]["attention masks"], (
        "candidates are distilled in one stage"
    )
    assert found["library", "block trainer"] == one_layer
    shard = ("scores", "parent shard")
    assert masked[shard] == plain[shard] | {"working": plain[shard]["working"] + one_layer}


# --- what it is kept under, and where it cannot be


def test_it_stands_in_the_keys_of_what_reads_packed_rows_and_of_nothing_else(tmp_path):
    runs = [make_run(save_parent_with_text(tmp_path), tmp_path / "store", *words) for words in ((), ("data.document_mask=true",))]
    assert runs[0].artifact("tokens").key == runs[1].artifact("tokens").key
    assert runs[0].artifact("profile").key == runs[1].artifact("profile").key
    for stage in (library_stage, scores, gkd, evaluation, quality):
        plain, masked = (stage.settings(run) for run in runs)
        assert "document_mask" not in plain and masked == plain | {"document_mask": True}, stage.__name__


def test_it_is_refused_where_it_cannot_be(monkeypatch):
    off = ".*write data.document_mask: false"
    with pytest.raises(ConfigError, match="tokenizer has no token that begins or ends a text" + off):
        masked_by(SimpleNamespace(bos_token_id=None, eos_token_id=None))
    assert masked_by(SimpleNamespace(bos_token_id=None, eos_token_id=7)) == 7
    factors = [1.0] * 4
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    phi = tiny_config("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    packed.check_packed(phi, 16)
    with pytest.raises(ConfigError, match=r"phi3's rotary frequencies \(longrope\) .* more than 16 tokens, .* up to 32" + off):
        packed.check_packed(phi, 32)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(ConfigError, match="the parent's family 'seed_oss' lets tokens see other documents of their row" + off):
        packed.check_packed(tiny_config("seed_oss"), 32)


@pytest.mark.parametrize("family", [*sorted(families()), "seed_oss"])
def test_every_family_is_tried_out_and_passes(family):
    packed.check_packed(tiny_config(family), 32)


def test_text_that_it_would_cut_within_a_document_is_refused_before_any_work(tmp_path):
    folder, text = save_parent_with_text(tmp_path)
    make_run((folder, text), tmp_path / "store", "data.document_mask=true").check()
    turns = tmp_path / "turns.jsonl"
    turns.write_text(json.dumps({"text": "<s>a question<s>an answer"}) + "\n")
    make_run((folder, turns), tmp_path / "store").check()
    with pytest.raises(DataError, match="document 1 has '<s>' in it, .*write data.document_mask: false, or take '<s>' out"):
        make_run((folder, turns), tmp_path / "store", "data.document_mask=true").check()
    turns.write_text(json.dumps({"text": "<s>a question, an answer"}) + "\n")
    make_run((folder, turns), tmp_path / "store", "data.document_mask=true").check()


def test_a_parent_that_cannot_is_refused_before_any_work(tmp_path):
    folder, text = save_parent_with_text(tmp_path)
    factors = [1.0] * 4
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    from byte_tokenizer import VOCAB_SIZE

    save_parent(folder, "phi3", vocab_size=VOCAB_SIZE + 7, rope_parameters=rope, original_max_position_embeddings=8)
    make_run((folder, text), tmp_path / "store").check()
    with pytest.raises(ConfigError, match="longrope"):
        make_run((folder, text), tmp_path / "store", "data.document_mask=true").check()


@pytest.mark.wide
def test_a_whole_run_reads_every_document_alone(tmp_path):
    """In one store: the tokens are shared, and all that reads them is made anew."""
    folder, text = save_parent_with_text(tmp_path)
    text = text.with_suffix(".jsonl")
    text.write_text("".join(json.dumps({"text": f"text number {n} of {n % 7}"}) + "\n" for n in range(400)))
    words = {"parent": str(folder), "data": str(text), "store": str(tmp_path / "store"), "progress": Quiet()}
    flat = {f"{name}.{setting}": value for name, section in SMALL.items() for setting, value in section.items()}
    found = [compress(**words, settings=flat | {"data.document_mask": mask}) for mask in (False, True)]
    made = [path.name.rpartition("-")[0] for path in (tmp_path / "store").iterdir() if path.is_dir()]
    assert made.count("tokens") == made.count("profile") == 1
    assert [made.count(name) for name in ("library", "scores", "architecture", "gkd", "evaluation", "quality")] == [2] * 6
    losses = [each.evaluation["models"]["parent"]["heldout_loss"] for each in found]
    assert losses[0] != losses[1]

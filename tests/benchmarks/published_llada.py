"""LLaDA's and Fast-dLLM's samplers, timed; `published_samplers.py` runs this in their environment.

    python published_llada.py MODEL LLADA FAST_DLLM DTYPE THREADS < cases.jsonl

MODEL is a directory with weights in LLaDA's names, LLADA and FAST_DLLM are clones of their
repositories. Each case says which sampler, on which prompts, with which arguments; its answer, a
line of JSON, has tokens and seconds.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

DEFAULTS = {
    "use_cache": True,
    "flash_attention": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "init_device": "cpu",
    "rope_full_precision": True,
    "layer_norm_with_affine": True,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
}


def load_module(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_model(directory, dtype):
    from model.configuration_llada import LLaDAConfig
    from model.modeling_llada import LLaDAModelLM

    raw = json.loads((directory / "config.json").read_text())
    known = {name: raw[name] for name in raw if name not in ("architectures", "model_type")}
    config = LLaDAConfig(**{**known, **DEFAULTS})
    config.use_cache = True  # its constructor does not keep it
    model = LLaDAModelLM(config)
    missing = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    if missing.missing_keys or missing.unexpected_keys:
        raise SystemExit(f"the weights do not fit: {missing}")
    return model.to(getattr(torch, dtype)).eval()


def main():
    directory, llada, fast = map(Path, sys.argv[1:4])
    torch.set_num_threads(int(sys.argv[5]))
    sys.path.insert(0, str(fast / "llada"))
    published = load_module("llada_generate", llada / "generate.py")
    quick = load_module("fast_dllm_generate", fast / "llada" / "generate.py")
    model = load_model(directory, sys.argv[4])
    samplers = {
        "llada": published.generate,
        "exact": quick.generate,
        "prefix": quick.generate_with_prefix_cache,
        "dual": quick.generate_with_dual_cache,
    }
    for line in sys.stdin:
        case = json.loads(line)
        sampler, prompts = samplers[case["sampler"]], torch.tensor(case["prompts"])
        # Fast-dLLM takes one prompt at a time.
        batches = [prompts] if case["sampler"] == "llada" else list(prompts[:, None])
        torch.manual_seed(0)
        start = time.perf_counter()
        made = [sampler(model, batch, **case["arguments"]) for batch in batches]
        seconds = time.perf_counter() - start
        made = [out if case["sampler"] == "llada" else out[0] for out in made]
        tokens = torch.cat(made)[:, prompts.shape[1] :].tolist()
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


main()

"""Small new models of every family, for tests, examples and recipes.

With `original=True` a LLaDA or Dream model is written as its authors publish theirs: their names of
the weights, their fields of config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dlmctl.models.policy import LEFT_TO_RIGHT, Family, Policy, usual_shift
from dlmctl.models.saving import save_policy, save_tokenizer
from dlmctl.models.weights import to_llada
from dlmctl.records.errors import UsageError
from dlmctl.records.files import publish_directory


def make_policy(
    family: Family,
    tokenizer: Any,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    intermediate_size: int | None = None,
    sampling: dict[str, int] | None = None,
    seed: int = 0,
) -> Policy:
    """A new model with random weights.

    Raises:
        UsageError: the sizes do not fit each other.
    """
    if hidden_size % heads or (hidden_size // heads) % 2:
        raise UsageError(
            f"--hidden-size {hidden_size} is not an even multiple of --heads {heads}: rotary "
            "embeddings need heads of even size"
        )
    torch.manual_seed(seed)
    model = _model(family, tokenizer, hidden_size, layers, heads, intermediate_size)
    return Policy(
        model=model.eval(),
        tokenizer=tokenizer,
        family=family,
        mask_id=None if family in LEFT_TO_RIGHT else tokenizer.mask_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        shift=usual_shift(family),
        vocab_size=len(tokenizer),
        name=f"new {family}",
        revision="new",
        sampling=sampling or {},
    )


def _model(
    family: Family, tokenizer: Any, hidden_size: int, layers: int, heads: int, inner: int | None
) -> Any:
    sizes = text_sizes(tokenizer, hidden_size, layers, heads, inner)
    if family == "mlm":
        without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForMaskedLM(BertConfig(**{**sizes, "tie_word_embeddings": True}, **without))
    sizes |= {"num_key_value_heads": heads}
    if family == "dream":
        return Qwen2ForCausalLM(Qwen2Config(**sizes, is_causal=False))
    if family == "a2d":
        head_dim = hidden_size // heads
        return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=head_dim, is_causal=False))
    return LlamaForCausalLM(LlamaConfig(**sizes, is_causal=family == "ar"))


def text_sizes(
    tokenizer: Any, hidden_size: int, layers: int, heads: int, inner: int | None
) -> dict[str, Any]:
    """Fields of a configuration that every small language model has, by transformers' names."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        # Two thirds of the usual four, as SwiGLU has three matrices; a multiple of 8.
        "intermediate_size": inner or -(-hidden_size * 8 // 3 // 8) * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
        # transformers' 0.02 suits widths near 2,500; in a narrow model it starves the blocks.
        "initializer_range": hidden_size**-0.5,
    }


def save_original(policy: Policy, directory: Path) -> None:
    """Write a LLaDA or Dream model under its authors' names.

    Raises:
        UsageError: another family has no original naming.
    """
    config = policy.model.config
    fields: dict[str, Any]
    weights = {name: t.contiguous() for name, t in policy.model.state_dict().items()}
    if policy.family == "llada":
        fields = _llada_fields(config, policy)
        weights = {to_llada(name): tensor for name, tensor in weights.items()}
    elif policy.family == "dream":
        fields = _dream_fields(config, policy)
    else:
        raise UsageError("--original-naming is for --family llada and --family dream")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(policy, directory)


def save_new(policy: Policy, directory: Path, original: bool) -> None:
    """Write a new model, as transformers has it or as its authors publish theirs.

    It appears whole or not at all; in a directory that is there, file by file.
    """
    save = save_original if original else save_policy
    if directory.exists():
        save(policy, directory)
    else:
        publish_directory(directory, lambda beside: save(policy, beside))


def _llada_fields(config: Any, policy: Policy) -> dict[str, Any]:
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "alibi": False,
        "rope": True,
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "mlp_hidden_size": config.intermediate_size,
        "max_sequence_length": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "mask_token_id": policy.mask_id,
        "eos_token_id": policy.eos_id,
        "pad_token_id": policy.pad_id,
    }


def _dream_fields(config: Any, policy: Policy) -> dict[str, Any]:
    return {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
        "mask_token_id": policy.mask_id,
        "bos_token_id": policy.eos_id,
        "eos_token_id": policy.eos_id,
        "pad_token_id": policy.pad_id,
    }

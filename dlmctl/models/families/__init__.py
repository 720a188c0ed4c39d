"""What a family of models is; each file of this folder declares one.

Models are loaded as stock classes of transformers: a config with `is_causal = False` makes a stock
decoder attend in both directions, so no model needs code of its own. Dropout is set to zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from dlmctl.models.attention import Blocks as Blocks
from dlmctl.models.attention import Pattern
from dlmctl.records.errors import DataError, reason_of
from dlmctl.settings.small import SmallModel

Raw = Mapping[str, Any]
"""A config.json."""

BLOCK_FIELDS = ("block_size", "block_length", "bd_size", "diffusion_block_size")
"""Fields of config.json that state the length of a block of block diffusion."""
BLOCK_SIGNS = (*BLOCK_FIELDS, "dlm_paradigm")
"""Fields that indicate block diffusion, in models that have a mask token."""

HOW_TO_READ = (
    "say how to read it with --family, --shift and --mask-id, or after its name, as in "
    "MODEL,family=a2d,mask_id=ID"
)


class Head(NamedTuple):
    """logits = capped(projection(transform(hidden states)))."""

    transform: Callable[[Tensor], Tensor]
    """[N, H] to [N, H]; most decoders have none, BERT-like encoders a layer of their own."""
    projection: nn.Linear
    """[N, H] to [N, V]."""
    cap: float | None = None
    """c, if logits are c tanh(z / c) of what is projected, as in Gemma 2 (arXiv 2408.00118)."""

    def logits(self, states: Tensor) -> Tensor:
        """[N, V] from hidden states [N, H]."""
        return self.capped(self.projection(self.transform(states)))

    def capped(self, projected: Tensor) -> Tensor:
        """Logits from what is projected, of any shape."""
        return projected if self.cap is None else self.cap * torch.tanh(projected / self.cap)


def output_head(model: Any) -> Head:
    """The output head of a Hugging Face model; raises DataError for an unknown kind."""
    if isinstance(getattr(model, "lm_head", None), nn.Linear):  # decoders
        scale, cap = _logit_scale(model), _text_field(model, "final_logit_softcapping") or None
        if scale == 1:
            return Head(nn.Identity(), model.lm_head, cap)
        if model.lm_head.bias is not None:
            raise DataError(f"{type(model).__name__} scales its logits after a bias")
        # Scaling the hidden states is the same, and costs H products instead of V.
        return Head(lambda states: states * scale, model.lm_head, cap)
    if hasattr(getattr(model, "lm_head", None), "decoder"):  # RoBERTa
        head = model.lm_head
        return Head(
            lambda states: head.layer_norm(functional.gelu(head.dense(states))), head.decoder
        )
    if hasattr(model, "cls"):  # BERT
        return Head(model.cls.predictions.transform, model.cls.predictions.decoder)
    if hasattr(model, "head") and hasattr(model, "decoder"):  # ModernBERT
        return Head(model.head, model.decoder)
    if hasattr(model, "vocab_projector"):  # DistilBERT
        return Head(
            lambda states: model.vocab_layer_norm(model.activation(model.vocab_transform(states))),
            model.vocab_projector,
        )
    raise DataError(f"{type(model).__name__} has no output head of a known kind")


@functools.cache
def _declares(config: Any, name: str) -> bool:
    return name in signature(config).parameters


def _text_field(model: Any, name: str) -> Any:
    """A field of the language model's config; None if its class does not have it.

    A config.json may have the field all the same, and the class does not look at it.
    """
    config = model.config.get_text_config()
    kind: Any = type(config)
    return getattr(config, name, None) if _declares(kind, name) else None


def _logit_scale(model: Any) -> float:
    """What a class multiplies its logits by: Cohere's `logit_scale`, and others' fields."""
    by_class = getattr(model, "logit_scale", None)
    scale = float(by_class) if isinstance(by_class, (int, float)) else 1.0
    return scale / float(_text_field(model, "logits_scaling") or 1)  # Granite divides


class ModelFamily:
    """A family of models. The defaults describe a stock decoder that denoises masked tokens.

    A file of this folder subclasses it, states what differs, and ends with `FAMILY = Subclass()`.
    The family's name is that of the file, with - for _.
    """

    # 1. Which config.json it recognises: first by the authors' own class, then by type, then by
    # class.
    model_types: tuple[str, ...] = ()
    """Patterns (fnmatch) of `model_type` in config.json, in lower case."""
    classes: tuple[str, ...] = ()
    """Patterns of the class names in `architectures`. An exact name need not be in transformers."""
    own_config = False
    """config.json has the authors' own fields, so that it cannot be read as another family."""

    # 2. What its checkpoints contain.
    auto_class = "AutoModelForCausalLM"
    """The class of transformers that knows which class a config is of."""
    tokenizer_class: str | None = None
    """The class of transformers for a tokenizer without tokenizer.json; None: as the files say."""
    ignored_weights: tuple[str, ...] = ()
    """Beginnings of the names of weights that the model is read without."""
    takes_images = False

    # 3. How it predicts tokens.
    diffusion = True
    """It denoises; otherwise it predicts the next token."""
    pattern: Pattern | None = "bidirectional"
    """How its tokens attend to each other; None: as the class of transformers has it."""
    shift = 0
    """The logits of position i are at position i - shift."""
    reuses_keys = True
    """A block-wise sampler may reuse keys and values (`--cache`): all layers are those of a decoder
    and attend to the whole sequence."""
    sampling: Mapping[str, Any] = {}
    """The authors' own options of the sampler (`settings.sampler.OWN`), if config.json states none;
    a block_length of None is the whole length."""

    # 4. Special tokens.
    mask_id: int | None = None
    """The mask token, if config.json does not state it; None: the tokenizer does."""
    turn_ends: tuple[str, ...] = ()
    """Tokens that end a turn, but not the completion."""
    fallback_end: str | None = None
    """Special token (as `sep_token`) that ends a completion if there is no end-of-sequence one."""

    # 5. Its modules.
    lora_targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        "query", "key", "value", "dense", "Wqkv", "Wo", "Wi",
        "qkv_proj", "gate_up_proj", "c_attn", "c_fc", "c_proj",
        "query_key_value", "dense_h_to_4h", "dense_4h_to_h",
    )  # fmt: skip
    """Names of the modules that a new LoRA adapter changes, if the model has them: all linear
    layers of a block, first in Llama- and Qwen-like decoders, then in BERT-like encoders, Phi-3,
    GPT-2 and GPT-NeoX.

    d1's diffu-GRPO lists the first seven, of which LLaDA's own code has q_proj, k_proj, v_proj and
    up_proj; its SFT lists q_proj, k_proj and v_proj.
    """
    language_layers: str | None = None
    """Path of the language model's blocks in a model that takes images."""
    head_size_multiple = 2
    """What the size of an attention head must be a multiple of, for rotary embeddings."""

    # 6. Texts.
    title = "diffusion language model"
    """What a model card calls it."""

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    def config(self, raw: Raw, where: str) -> PretrainedConfig:
        """The config of transformers; raises DataError if the model is of no stock class."""
        return stock_config(raw, where)

    def check(self, raw: Raw, where: str) -> None:
        """Refuse a config.json that transformers would read as a different model.

        Not called when the user, or dlmctl's own field in config.json, says how to read it.

        Raises:
            DataError: the message says what is doubtful, and what to write instead.
        """
        signs = [name for name in BLOCK_SIGNS if name in raw]
        if self.own_config:
            if signs and self.pattern != "block-causal" and raw[signs[0]] is not None:
                raise DataError(
                    f"its {signs[0]} indicates block diffusion, and models of family {self.name} "
                    f"attend to the whole text: write MODEL,family={self.name} if this one does",
                    where,
                )
            return
        has_mask = raw.get("mask_token_id") is not None
        if signs and self.pattern != "block-causal" and (self.pattern != "causal" or has_mask):
            raise DataError(
                f"its {signs[0]} indicates block diffusion, and its type "
                f"'{raw.get('model_type')}' is of no family that is known to have it; {HOW_TO_READ}"
                ", or family=bd3lm,block_length=B if it attends block by block",
                where,
            )
        auto, kinds = raw.get("auto_map") or {}, ("AutoModelForCausalLM", "AutoModelForMaskedLM")
        mapped = [str(auto[kind]).rpartition(".")[2] for kind in kinds if kind in auto]
        classes = [*map(str, raw.get("architectures") or []), *mapped]
        if unknown := [n for n in classes if n not in {*dir(transformers), *self.classes}]:
            raise DataError(
                f"its class {unknown[0]} is not part of transformers, so its type "
                f"'{raw.get('model_type')}' does not say how it attends; {HOW_TO_READ}",
                where,
            )
        if not self.diffusion and has_mask:
            raise DataError(
                "it has a mask token and would be read from left to right: is it a diffusion "
                f"model? Then {HOW_TO_READ}; or write family=ar",
                where,
            )

    def block_length(self, raw: Raw, where: str) -> int | None:
        """Tokens of a block of a block-causal model as config.json states them, if it does."""
        return next((raw[name] for name in BLOCK_FIELDS if raw.get(name) is not None), None)

    def blocks(self, length: int) -> Blocks:
        """The blocks of a block-causal model."""
        return Blocks(length)

    def rename(self, name: str) -> str:
        """Name in transformers of a weight of the authors' checkpoints and adapters."""
        return name

    def head(self, model: Any) -> Head:
        """The output head of a loaded model; raises DataError for an unknown kind."""
        return output_head(model)

    def image_layout(self, config: Any, tokenizer: Any) -> dict[str, Any]:
        """How a model that takes images takes them: fields of `Vision` from `mark` to `marks`."""
        raise NotImplementedError

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        """The config of a small new model; it may add special tokens to the tokenizer."""
        return LlamaConfig(**decoder_sizes(small, tokenizer), is_causal=self.pattern == "causal")

    def new_processor(self, config: Any) -> Any:
        """The image processor of a small new model."""

    def original_config(self, config: Any, special_ids: dict[str, Any]) -> dict[str, Any] | None:
        """config.json as the authors write it; None: they publish stock models of transformers.

        Args:
            special_ids: its fields `mask_token_id`, `eos_token_id` and `pad_token_id`.
        """
        return None

    def original_name(self, name: str) -> str:
        """The inverse of `rename`."""
        return name


def stock_config(raw: Raw, where: str) -> PretrainedConfig:
    """A config of transformers, without dropout; raises DataError for a type it does not have."""
    fields = {k: v for k, v in raw.items() if k not in ("model_type", "auto_map", "architectures")}
    try:
        config = AutoConfig.for_model(raw.get("model_type", ""), **fields)
    except (ValueError, KeyError) as error:
        reason = reason_of(error)
        raise DataError(
            f"model type '{raw.get('model_type')}' is not known to transformers ({reason}); models "
            "that bring their own code are not loaded",
            where,
        ) from None
    config.architectures = raw.get("architectures")
    parts = [getattr(config, name, None) for name in ("text_config", "vision_config")]
    for part in (config, *(part for part in parts if isinstance(part, PretrainedConfig))):
        for name in vars(part):
            if name.endswith(("dropout", "dropout_prob", "_pdrop")) and getattr(part, name):
                # A score and its gradient must belong to the same function.
                setattr(part, name, 0.0)
    return config


def decoder_sizes(small: SmallModel, tokenizer: Any) -> dict[str, Any]:
    """Fields of the config of a small decoder, by transformers' names."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": small.hidden_size,
        # Two thirds of the usual four, as SwiGLU has three matrices; a multiple of 8.
        "intermediate_size": small.intermediate_size or -(-small.hidden_size * 8 // 3 // 8) * 8,
        "num_hidden_layers": small.layers,
        "num_attention_heads": small.heads,
        "num_key_value_heads": small.heads,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
        # transformers' 0.02 suits widths near 2,500; in a narrow model it starves the blocks.
        "initializer_range": small.hidden_size**-0.5,
    }


def mixture_sizes(small: SmallModel, tokenizer: Any) -> dict[str, Any]:
    """The same for a small mixture of experts: four, of which a token takes two.

    An expert has half the width of a dense MLP, so that a token takes as many parameters.
    """
    sizes = decoder_sizes(small, tokenizer)
    return {
        **sizes,
        "head_dim": small.hidden_size // small.heads,
        "moe_intermediate_size": -(-sizes["intermediate_size"] // 2),
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }

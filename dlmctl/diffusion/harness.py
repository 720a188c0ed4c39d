"""A model of lm-evaluation-harness: `dlmctl`, any policy that is loaded here.

    log-likelihood   ELBO of the continuation given its context, under the masks of `score-elbo`;
                     exact for an autoregressive model
    is_greedy        the sampler at temperature 0 gives the continuation, token for token
    generation       the sampler of `rollout`; what follows a stop string is cut off afterwards

Importing the module registers the name with the harness, which has no entry points for models;
`dlmctl lm-eval` imports it and hands its arguments on. Contexts and continuations are split into
tokens as the harness has it: together, spaces at the end of a context going to the continuation.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, get_args

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from dlmctl.diffusion.autoregressive import sample_autoregressive
from dlmctl.diffusion.elbo import Example, elbo_samples
from dlmctl.diffusion.noise import stream_key
from dlmctl.diffusion.sampler import sample_stream
from dlmctl.diffusion.sampling import Request, SamplerConfig, configured
from dlmctl.diffusion.scoring import MaskPlan, completion_masks
from dlmctl.models.loading import load_policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.settings.masks import LAWS
from dlmctl.settings.models import Reading
from dlmctl.settings.sampler import CacheRule, EosRule, Remasking, Sampler

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
"""Names that tasks have for the length of a completion."""
UNSAMPLED = frozenset({"until", "stop", "do_sample", "temperature", *LENGTHS})
SAMPLER = (
    "block_length",
    "steps",
    "cfg_scale",
    "remasking",
    "threshold",
    "factor",
    "cache",
    "refresh",
    "refresh_below",
    "eos",
    "early_stop",
    "compile",
)
"""Arguments that go to the sampler as they are, under the names of `rollout`."""
CHOICES = {
    "remasking": get_args(Remasking),
    "cache": get_args(CacheRule),
    "eos": get_args(EosRule),
    "masks": LAWS,
}
"""Values of the arguments that have a few."""
DEFAULT_LENGTH = 2048
"""Tokens that a model of no stated length takes."""


class Pair(NamedTuple):
    """A continuation to be scored."""

    context: list[int]
    continuation: list[int]
    keys: tuple[str | int, ...]
    """Names of its masks."""
    sample: int = 0


@register_model("dlmctl")
class HarnessModel(LM):
    """A policy as lm-evaluation-harness asks it."""

    counted: ClassVar[Any] = staticmethod(lambda items, what, total: items)
    """Passes on what takes long, and may say how far it is: of items, their name and number."""

    def __init__(
        self,
        pretrained: str = "builtin:puzzles",
        masks: str = "stratified",
        masks_per_sample: int = 4,
        seed: int = 0,
        greedy: bool = True,
        gen_length: int | None = None,
        max_length: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = None,
        family: Any = None,
        shift: int | None = None,
        mask_id: int | None = None,
        max_batch_size: int | None = None,
        **sampler: Any,
    ) -> None:
        """Load a model; the arguments are those of `--model_args`.

        Args:
            pretrained: name, directory or run, as `--model` of other subcommands takes it.
            masks, masks_per_sample: law and number of the masks of a score.
            greedy: whether is_greedy is found out, which takes a completion for each continuation;
                otherwise it is false. Tasks of several choices do not use it.
            gen_length: tokens of a completion, whatever the task says.
            max_length: tokens of context and continuation; a longer context loses its beginning.
            family, shift, mask_id: how to read the model, as in `Reading`.
            sampler: of SAMPLER.

        Raises:
            UsageError: an argument is not known; and what `load_policy` raises.
        """
        super().__init__()
        if unknown := set(sampler) - set(SAMPLER):
            raise UsageError(
                f"--model_args {min(unknown)} is not known; there are pretrained, masks, "
                f"masks_per_sample, seed, greedy, gen_length, max_length, dtype, family, shift, "
                f"mask_id, "
                f"{', '.join(SAMPLER)}"
            )
        for name, value in {**sampler, "masks": masks}.items():
            if name in CHOICES and value not in CHOICES[name]:
                there = ", ".join(CHOICES[name])
                raise UsageError(f"--model_args {name}={value} is none of {there}")
        name = Reading(family, shift, mask_id).name(pretrained)
        self.policy = load_policy(name, device or "auto", dtype)
        self.plan = MaskPlan(masks, masks_per_sample, seed)  # type: ignore[arg-type]
        self.seed, self.greedy, self.sampler, self.gen_length = seed, greedy, sampler, gen_length
        automatic = str(batch_size or "auto").startswith("auto")
        self.batch_size = 32 if automatic else int(str(batch_size))
        config = self.policy.core.config.get_text_config()
        stated = getattr(config, "max_position_embeddings", None)
        self.max_length = int(max_length or stated or DEFAULT_LENGTH)
        self._told: set[str] = set()

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """ELBO of each continuation given its context in nats, and whether it is the greedy one.

        Raises:
            DataError: a text has no tokens, or more than `max_length`.
        """
        pairs = [self._pair(request) for request in requests]
        values = self._elbos(pairs)
        same = self._is_greedy(pairs) if self.greedy else [False] * len(pairs)
        answers = list(zip(values, same, strict=True))
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """ELBO of each whole text in nats.

        A text longer than the model takes is cut into pieces that each see the last token of the
        piece before.
        """
        pieces: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.policy.encode_text(request.args[0])
            room = self.max_length - 1
            for start in range(0, len(ids), room):
                context = ids[start - 1 : start] if start else self._beginning()
                keys = (*self._keys(request), *([start] if start else []))
                pieces.append(Pair(context, ids[start : start + room], keys))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, value in zip(owners, self._elbos(pieces), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A completion of each context, up to the first of its stop strings."""
        texts = [""] * len(requests)
        repeats: Counter[tuple[str | int, ...]] = Counter()
        groups: dict[SamplerConfig, list[tuple[int, Request]]] = {}
        for number, request in enumerate(requests):
            context, asked = request.args[0], request.args[1]
            settings = self._settings(asked)
            name = self._record_id(request)
            key = stream_key(self.seed, 0, name, repeats[request.task_name, name])
            repeats[request.task_name, name] += 1
            ids = self._latest(self._context(context), settings.gen_length)
            groups.setdefault(settings, []).append((number, Request(ids or self._beginning(), key)))
        for settings, members in groups.items():
            made = self._sample([request for _, request in members], settings)
            for (number, _), tokens in zip(members, made, strict=True):
                texts[number] = before_stops(
                    self.policy.decode(tokens), stops_of(requests[number].args[1])
                )
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's own template writes it."""
        if self.policy.tokenizer.chat_template is None:
            raise UsageError(f"{self.policy.name} has no chat template: drop --apply_chat_template")
        return str(
            self.policy.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests is filed under."""
        return self.policy.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template itself, for the harness's log."""
        return str(self.policy.tokenizer.chat_template or "") if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """What stands beside the results."""
        about: dict[str, Any] = {
            "model_name": self.policy.name,
            "model_revision": self.policy.revision,
        }
        if self.policy.diffusion:
            about |= {"masks": self.plan.law, "masks_per_sample": self.plan.samples}
        return about

    def _pair(self, request: Any) -> Pair:
        context, continuation = request.args
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self._context(context)
        ids = self._context(context + continuation)[len(before) :]
        if not ids:
            raise DataError(f"a continuation of {request.task_name} is empty: nothing to score")
        if len(ids) >= self.max_length:
            raise DataError(
                f"a continuation of {request.task_name} has {len(ids)} tokens, and the most that "
                f"the model takes, context and all, is max_length={self.max_length}"
            )
        before = self._latest(before, len(ids)) or self._beginning()
        sample = request.doc.get("sample") if isinstance(request.doc, dict) else None
        return Pair(before, ids, self._keys(request), sample if isinstance(sample, int) else 0)

    def _latest(self, context: list[int], reserved: int) -> list[int]:
        """The end of a context that leaves room for `reserved` tokens."""
        room = self.max_length - reserved
        if room < 0:
            raise UsageError(f"gen_length {reserved} is more than max_length {self.max_length}")
        return context[len(context) - room :] if len(context) > room else context

    def _context(self, text: str) -> list[int]:
        """Ids of a text that is continued; one from a chat template brings its special tokens."""
        plain, lead = self.policy.encode_text(text), self.policy.encode_context("")
        return plain if plain[: len(lead)] == lead else self.policy.encode_context(text)

    def _beginning(self) -> list[int]:
        """What stands before the first token of a text."""
        lead = self.policy.encode_context("")
        if lead or self.policy.diffusion:
            return lead
        first = self.policy.tokenizer.bos_token_id
        first = self.policy.eos_id if first is None else first
        return [] if first is None else [first]

    def _record_id(self, request: Any) -> str | int:
        """The document's own id, as `rollout` and `score-elbo` go by; else its number in the task.

        The choices of a question share it, and with it the draw of their masks: a comparison of
        them is a paired one.
        """
        own = request.doc.get("id") if isinstance(request.doc, dict) else None
        if isinstance(own, str | int) and not isinstance(own, bool):
            return own
        return f"{request.task_name}/{request.doc_id}"

    def _keys(self, request: Any) -> tuple[str | int, ...]:
        """As `score-elbo` names the masks of a record."""
        return (self.plan.seed, self._record_id(request), 0, self.plan.draw)

    def _elbos(self, pairs: Sequence[Pair]) -> list[float]:
        values: list[float] = []
        starts = range(0, len(pairs), self.batch_size)
        for start in self.counted(starts, "batches", len(starts)):
            examples = [self._example(pair) for pair in pairs[start : start + self.batch_size]]
            samples = elbo_samples(self.policy, examples, self.batch_size)
            values += samples.mean(dim=1).tolist()
        return values

    def _example(self, pair: Pair) -> Example:
        context, continuation, keys, sample = pair
        if not context and not self.policy.diffusion:
            raise DataError(f"{self.policy.name} has no token for the beginning of a text")
        masks = completion_masks(self.policy, len(context), continuation, self.plan, keys, sample)
        return Example(context, continuation, masks)

    def _is_greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        same = [False] * len(pairs)
        lengths = sorted({len(pair.continuation) for pair in pairs})
        for length in lengths:
            settings = self._greedy_settings(length)
            members = [n for n, pair in enumerate(pairs) if len(pair.continuation) == length]
            requests = [Request(pairs[n].context, stream_key(*pairs[n].keys)) for n in members]
            for n, tokens in zip(members, self._sample(requests, settings), strict=True):
                same[n] = tokens == pairs[n].continuation
        return same

    def _greedy_settings(self, length: int) -> SamplerConfig:
        """A completion of exactly `length` tokens; of no more steps than it has tokens."""
        given = {**self.sampler, **self._blocks(length), "early_stop": False}
        if given.get("steps"):
            own = configured(self.policy, Sampler(gen_length=length, **self._blocks(length)))
            given["steps"] = max(own.blocks, min(length, given["steps"]))
        return configured(self.policy, Sampler(gen_length=length, temperature=0.0, **given))

    def _blocks(self, length: int) -> dict[str, Any]:
        block = self.sampler.get("block_length")
        return {} if block is None else {"block_length": min(block, length)}

    def _settings(self, asked: dict[str, Any]) -> SamplerConfig:
        """The sampler's settings for a task's `generation_kwargs`."""
        for name in sorted(set(asked) - UNSAMPLED - self._told):
            self._told.add(name)
            print(f"dlmctl: the task's {name}={asked[name]} is not used", file=sys.stderr)
        length = next((int(asked[name]) for name in LENGTHS if asked.get(name)), None)
        temperature = asked.get("temperature")
        if temperature is None:
            temperature = 1.0 if asked.get("do_sample") else 0.0
        elif asked.get("do_sample") is False:
            temperature = 0.0
        length = self.gen_length or length
        return configured(
            self.policy,
            Sampler(gen_length=length, temperature=float(temperature), **self.sampler),
        )

    def _sample(self, requests: Sequence[Request], settings: SamplerConfig) -> list[list[int]]:
        sampler = sample_stream if self.policy.diffusion else sample_autoregressive
        samples = sampler(self.policy, requests, settings, self.batch_size)
        return [made.tokens for made in self.counted(samples, "completions", len(requests))]


def stops_of(asked: dict[str, Any]) -> list[str]:
    """The stop strings of a task's `generation_kwargs`."""
    stops = asked.get("until") or asked.get("stop") or []
    return [stops] if isinstance(stops, str) else list(stops)


def before_stops(text: str, stops: Sequence[str]) -> str:
    """A text up to the first place where any of the stop strings stands."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=None)]

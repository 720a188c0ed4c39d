"""The model `dlmctl` of lm-evaluation-harness: any policy that this package loads.

    log-likelihood   ELBO of the continuation given its context, under the masks of `score-elbo`;
                     exact for an autoregressive model
    is_greedy        the sampler at temperature 0 gives the continuation, token for token
    generation       the sampler of `rollout`; what follows a stop string is cut off afterwards

Importing the module registers the name with the harness, which has no entry points for models;
`dlmctl lm-eval` imports it and passes its arguments on. Contexts and continuations are tokenized as
the harness does it: together, with spaces at the end of a context moved to the continuation.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

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
from dlmctl.settings.mask_laws import LAWS
from dlmctl.settings.models import Reading
from dlmctl.settings.sampler import Sampler

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
"""Names that tasks have for the length of a completion."""
UNSAMPLED = frozenset({"until", "stop", "do_sample", "temperature", *LENGTHS})
KINDS = get_type_hints(Sampler)
SAMPLER = tuple(name for name in KINDS if name not in ("gen_length", "temperature"))
"""Arguments that go to the sampler as they are, under the names of `rollout`."""
CHOICES = {
    name: get_args(part)
    for name, kind in KINDS.items()
    for part in (kind, *get_args(kind))
    if get_origin(part) is Literal
}
"""Values of the sampler's arguments that have a fixed set."""
DEFAULT_LENGTH = 2048
"""Tokens that a model takes if its configuration does not say how many."""


class Pair(NamedTuple):
    """A continuation to score."""

    context: list[int]
    continuation: list[int]
    keys: tuple[str | int, ...]
    """What its masks are drawn from."""
    sample: int = 0


@register_model("dlmctl")
class HarnessModel(LM):
    """A policy with the methods that lm-evaluation-harness calls."""

    counted: ClassVar[Any] = staticmethod(lambda items, what, total: items)
    """Passes items on and may show progress; arguments: the items, their name, their number."""

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
            greedy: compute is_greedy, which takes a completion for each continuation; otherwise it
                is false. Multiple-choice tasks do not use it.
            gen_length: tokens of a completion, whatever the task says.
            max_length: tokens of context and continuation; a longer context loses its beginning.
            family, shift, mask_id: how to read the model, as in `Reading`.
            sampler: fields of `Sampler` that are in SAMPLER.

        Raises:
            UsageError: an argument is not known; and what `load_policy` raises.
        """
        super().__init__()
        if unknown := set(sampler) - set(SAMPLER):
            raise UsageError(
                f"--model_args {min(unknown)} is not known; there are pretrained, masks, "
                f"masks_per_sample, seed, greedy, gen_length, max_length, dtype, family, shift, "
                f"mask_id, {', '.join(SAMPLER)}"
            )
        choices = {**CHOICES, "masks": LAWS}
        for name, value in {**sampler, "masks": masks}.items():
            if name in choices and value not in choices[name]:
                known = ", ".join(choices[name])
                raise UsageError(f"--model_args {name}={value} is none of {known}")
        name = Reading(family, shift, mask_id).name(pretrained)
        self.policy = load_policy(name, device or "auto", dtype)
        self.plan = MaskPlan(masks, masks_per_sample, seed)  # type: ignore[arg-type]
        self.seed, self.greedy, self.sampler, self.gen_length = seed, greedy, sampler, gen_length
        automatic = str(batch_size or "auto").startswith("auto")
        self.batch_size = 32 if automatic else int(str(batch_size))
        config = self.policy.core.config.get_text_config()
        stated = getattr(config, "max_position_embeddings", None)
        self.max_length = int(max_length or stated or DEFAULT_LENGTH)
        self._reported: set[str] = set()

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """ELBO of each continuation given its context in nats, and whether it is the greedy one.

        Raises:
            DataError: a text has no tokens, or more than `max_length`.
        """
        pairs = [self._pair(request) for request in requests]
        values = self._elbos(pairs)
        greedy = self._is_greedy(pairs) if self.greedy else [False] * len(pairs)
        answers = list(zip(values, greedy, strict=True))
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """ELBO of each whole text in nats.

        A text longer than `max_length` is cut into pieces; each piece sees the last token of the
        piece before it.
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
        """A completion of each context, up to its first stop string."""
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
            samples = self._sample([request for _, request in members], settings)
            for (number, _), tokens in zip(members, samples, strict=True):
                texts[number] = before_stops(
                    self.policy.decode(tokens), stops_of(requests[number].args[1])
                )
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the model's own chat template.

        Raises:
            UsageError: the tokenizer has no template.
        """
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
        """Key of the harness's cache of requests."""
        return self.policy.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template itself, for the harness's log."""
        return str(self.policy.tokenizer.chat_template or "") if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes next to the results."""
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
        """The end of a context, cut to leave room for `reserved` tokens."""
        room = self.max_length - reserved
        if room < 0:
            raise UsageError(f"gen_length {reserved} is more than max_length {self.max_length}")
        return context[len(context) - room :] if len(context) > room else context

    def _context(self, text: str) -> list[int]:
        """Ids of a text to continue; a text from a chat template has its special tokens already."""
        plain, lead = self.policy.encode_text(text), self.policy.encode_context("")
        return plain if plain[: len(lead)] == lead else self.policy.encode_context(text)

    def _beginning(self) -> list[int]:
        """Ids before the first token of a text."""
        lead = self.policy.encode_context("")
        if lead or self.policy.diffusion:
            return lead
        first = self.policy.tokenizer.bos_token_id
        first = self.policy.eos_id if first is None else first
        return [] if first is None else [first]

    def _record_id(self, request: Any) -> str | int:
        """The document's own id, as `rollout` and `score-elbo` use it; else its number in the task.

        The choices of a question share the id and so the draw of their masks: comparisons between
        choices are paired.
        """
        own = request.doc.get("id") if isinstance(request.doc, dict) else None
        if isinstance(own, str | int) and not isinstance(own, bool):
            return own
        return f"{request.task_name}/{request.doc_id}"

    def _keys(self, request: Any) -> tuple[str | int, ...]:
        """What `score-elbo` draws the masks of a record from."""
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
        greedy = [False] * len(pairs)
        lengths = sorted({len(pair.continuation) for pair in pairs})
        for length in lengths:
            settings = self._greedy_settings(length)
            members = [n for n, pair in enumerate(pairs) if len(pair.continuation) == length]
            requests = [Request(pairs[n].context, stream_key(*pairs[n].keys)) for n in members]
            for n, tokens in zip(members, self._sample(requests, settings), strict=True):
                greedy[n] = tokens == pairs[n].continuation
        return greedy

    def _greedy_settings(self, length: int) -> SamplerConfig:
        """A completion of exactly `length` tokens, in at most as many steps."""
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
        for name in sorted(set(asked) - UNSAMPLED - self._reported):
            self._reported.add(name)
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
        return [sample.tokens for sample in self.counted(samples, "completions", len(requests))]


def stops_of(asked: dict[str, Any]) -> list[str]:
    """The stop strings of a task's `generation_kwargs`."""
    stops = asked.get("until") or asked.get("stop") or []
    return [stops] if isinstance(stops, str) else list(stops)


def before_stops(text: str, stops: Sequence[str]) -> str:
    """A text up to the first occurrence of any stop string."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=None)]

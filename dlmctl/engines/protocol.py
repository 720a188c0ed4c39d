"""What is asked of an inference engine, and what every answer must hold to."""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from dlmctl.engines.connection import Connection
from dlmctl.records.errors import DataError, UsageError
from dlmctl.settings.models import split_name

ROUNDING = 1e-3
"""How far above 0 a log-probability in half precision may be."""
PROBES = (1.0, 2.0, 0.05)
"""Temperatures at which an engine is asked what its log-probabilities are; vLLM has up to 2."""
LATEST = "latest"
"""The link of a run to its newest checkpoint."""
LONGEST_NAME = 300
OWN_VERSION = re.compile(r"[0-9a-f]{16}")
"""A version of weights that dlmctl gave them: their hash."""


@dataclass(frozen=True)
class Generation:
    """One completion to be made."""

    prompt: list[int]
    seed: int
    """From 0 to 2^31 - 1."""
    length: int
    """The most tokens, an end-of-sequence included."""
    temperature: float
    top_p: float
    """1: off."""
    top_k: int
    """0: off."""
    ends: Sequence[int]
    """Tokens that end it."""
    vocab_size: int
    where: str = ""
    """`file:line` of the record, for errors."""

    @property
    def greedy(self) -> bool:
        """Whether it takes the most probable token each time."""
        return self.temperature == 0 or self.top_p == 0

    @property
    def as_the_model(self) -> bool:
        """Whether its tokens have the log-probabilities of the model at temperature 1 in any
        engine, which scales and cuts greedy choices nowhere."""
        return self.greedy or (self.temperature == 1 and self.top_p == 1 and self.top_k == 0)


class Answer(NamedTuple):
    """One completion."""

    tokens: list[int]
    """Up to and including end-of-sequence."""
    log_probs: list[float] | None
    """Of each token in nats; None if they are not those of the model at temperature 1."""
    engine: str
    """Name and version of what made it."""
    order: list[int] | None = None
    """Step that decided each token, from an engine that says so; None: from left to right."""


@dataclass(frozen=True)
class Weights:
    """The weights that a server is to sample from."""

    name: str
    """As `load_policy` takes it."""
    directory: Path
    revision: str
    pushed: bool
    """Whether the server may have to load them; else it serves them already."""
    base: Weights | None = None
    """The weights below them, if they are those of an adapter."""


class Engine(ABC):
    """A server that has been recognised; one subclass for each protocol."""

    title: ClassVar[str]
    takes_weights: ClassVar[str]
    """What a server needs so that it can be given weights."""

    def __init__(self, connection: Connection, version: str) -> None:
        self.connection = connection
        self.described = f"{self.title} {version}".strip()

    @classmethod
    @abstractmethod
    def recognised(cls, connection: Connection) -> Engine | None:
        """The server as one of these; None if it is something else."""

    @abstractmethod
    def served(self) -> list[Any]:
        """Names and paths of the model that it serves, as it says."""

    @abstractmethod
    def version_of_weights(self) -> str | None:
        """What the weights were called when they were pushed; None if it does not say."""

    @abstractmethod
    def push(self, weights: Weights) -> None:
        """Make it load the files of these weights; raises DataError if it does not."""

    @abstractmethod
    def generate(self, generation: Generation) -> Answer:
        """One completion; raises Lost and DataError."""

    @abstractmethod
    def best_log_prob(self, prompt: list[int], temperature: float) -> float:
        """What it calls the log-probability of the most probable next token."""

    def take(self, weights: Weights) -> None:
        """Return when it samples from these weights.

        Raises:
            UsageError: it serves another model, or does not take weights.
            DataError: it cannot load them.
        """
        url, version = self.connection.url, self.version_of_weights()
        if weights.pushed and version is None:
            raise UsageError(f"{url} does not say what weights it has: {self.takes_weights}")
        if version == weights.revision:
            return
        altered = version is not None and bool(OWN_VERSION.fullmatch(version))
        if not altered and any(same_model(weights, name) for name in self.served()):
            return
        if weights.pushed:
            self.push(weights)
            if (now := self.version_of_weights()) != weights.revision:
                raise DataError(
                    f"{url} was given the weights {weights.revision} of {weights.directory}, and "
                    f"says that it has {now}: another command may be changing them, or "
                    f"{self.takes_weights}"
                )
            return
        if altered:
            raise UsageError(
                f"{url} has the weights {version}, which a training loop gave it, and those of -m "
                f"{weights.name} are {weights.revision}: start the server again, or name the "
                "checkpoint with -m"
            )
        named = " or ".join(dict.fromkeys(map(str, self.served()))) or "nothing"
        raise UsageError(
            f"{url} serves {named[:LONGEST_NAME]}, and -m is {weights.name}: give the model that "
            "it serves (of a run, a checkpoint), or start it with this one"
        )

    def checked(
        self,
        generation: Generation,
        tokens: Any,
        log_probs: Any,
        finish: Any,
    ) -> Answer:
        """The answer of its parts.

        Raises:
            DataError: it is no completion that was asked for.
        """
        length, vocab_size = generation.length, generation.vocab_size
        if not isinstance(tokens, list) or not all(type(i) is int for i in tokens):
            raise self.fault("has no list of token ids")
        if not 1 <= len(tokens) <= length:
            raise self.fault(f"has {len(tokens)} tokens, expected 1 to {length}")
        if not 0 <= min(tokens) <= max(tokens) < vocab_size:
            wrong = next(i for i in tokens if not 0 <= i < vocab_size)
            raise self.fault(f"has the id {wrong}, and the model has {vocab_size} tokens")
        if not set(generation.ends).isdisjoint(tokens[:-1]):
            raise self.fault("goes on after the end of the sequence")
        if tokens[-1] not in generation.ends and len(tokens) < length:
            raise self.fault(
                f"ends ({finish}) after {len(tokens)} of {length} tokens without an end of the "
                "sequence: its context may be full, or it may have other tokens for the end"
            )
        if not isinstance(log_probs, list) or len(log_probs) != len(tokens):
            raise self.fault("does not have a log-probability for each token")
        if not all(type(x) in (int, float) and math.isfinite(x) for x in log_probs):
            raise self.fault("has log-probabilities that are no numbers")
        if max(log_probs) > ROUNDING:
            raise self.fault(
                "has log-probabilities above 0: they may be logits, which is an option of the "
                "server (--logprobs-mode of vLLM)"
            )
        return Answer(tokens, [float(x) for x in log_probs], self.described)

    def fault(self, what: str) -> DataError:
        """An answer that does not follow the protocol."""
        return DataError(f"the answer of {self.connection.url} {what}")


def same_model(weights: Weights, served: Any) -> bool:
    """Whether a name or path that a server says is of these weights.

    The newest checkpoint of a run, by the name of the run, is not: since the server was started, it
    may have become another.
    """
    if not isinstance(served, str) or "\0" in served:
        return False
    name = split_name(weights.name)[0]
    if served == name.partition("@")[0] and not os.path.isdir(Path(name).expanduser()):
        return True
    if not os.path.isdir(served) or os.path.exists(Path(served) / LATEST):
        return False
    return Path(served).name != LATEST and Path(served).resolve() == weights.directory.resolve()


def before_temperature(best: Sequence[float]) -> bool:
    """Whether log-probabilities that an engine gives are those of the model, before temperature.

    An option of the server decides it, and no path tells it. After temperature, the most probable
    token would be less probable at 2 and more probable at 0.05, unless it has equals alone: one
    with p at temperature 1 has at most 1 / (1 + sqrt((1 - p) / p)) at 2. False if that cannot be
    told from rounding, as of a token that is all but certain.

    Args:
        best: log-probabilities of the most probable token at the temperatures of `PROBES`.
    """
    at_one, *others = best
    return at_one < -0.0015 and all(abs(other - at_one) < 0.02 for other in others)

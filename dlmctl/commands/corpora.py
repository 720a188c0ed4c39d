"""What the commands share that run a model over a corpus under the forward masking process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import OnError
from dlmctl.settings.corpus import AS_TRAINED, Corpus
from dlmctl.settings.parsing import level_range

if TYPE_CHECKING:
    from dlmctl.models.policy import Policy
    from dlmctl.sae.corpus import CorpusPlan, MaskedBatch
    from dlmctl.sae.formats.folders import SavedSae


def own_model(saved: Mapping[str, SavedSae], model: str | None) -> str:
    """The model that is given, else the one that the autoencoders were trained on.

    Raises:
        UsageError: they were trained on several.
    """
    from dlmctl.sae.formats.folders import trained_with

    return model or str(trained_with(saved, "model_name", "builtin:puzzles", "--model"))


def corpus_plan(
    corpus: Corpus = AS_TRAINED, seed: int = 0, saved: Mapping[str, SavedSae] | None = None
) -> CorpusPlan:
    """The settings of a corpus; what is None is as the autoencoders say, by their folders' names.

    Whether the level was drawn per batch is not taken from them: for a single token it is the same
    distribution.

    Raises:
        UsageError: the autoencoders disagree on what is None.
        DataError: a folder has a value of the wrong type.
    """
    from dlmctl.sae.corpus import CorpusPlan, MaskLaw
    from dlmctl.sae.formats.folders import trained_with

    def chosen(setting: Any, name: str, default: Any, option: str) -> Any:
        if setting is not None:
            return setting
        return trained_with(saved, name, default, option) if saved else default

    low, high = level_range(corpus.level) if corpus.level else (None, None)
    t = chosen(low, "dlm_t_min", 0.0, "--t"), chosen(high, "dlm_t_max", 1.0, "--t")
    context = chosen(corpus.context, "context_size", 2048, "--context")
    if context < 2:
        raise UsageError(f"the autoencoders were trained on a context of {context}: give --context")
    return CorpusPlan(
        MaskLaw(*t, bool(corpus.per_batch), seed),
        context,
        chosen(corpus.pack, "dlm_pack", False, "--pack or --no-pack"),
        chosen(corpus.hide_prompt, "dlm_hide_prompt", False, "--hide-prompt or --keep-prompt"),
    )


def corpus_batches(
    files: Sequence[str],
    policy: Policy,
    plan: CorpusPlan,
    batch_size: int,
    on_error: OnError = "fail",
) -> Iterator[MaskedBatch]:
    """Masked batches of a corpus."""
    from dlmctl.sae.corpus import masked_corpus, read_documents

    stream = read_documents(files, policy, plan, on_error)
    return masked_corpus(stream, policy, plan.law, batch_size)


def split_paths(paths: list[str]) -> tuple[list[Path], list[str]]:
    """Directories, which contain autoencoders, and files of a corpus.

    Raises:
        UsageError: there is no directory.
    """
    folders = [Path(path) for path in paths if Path(path).is_dir()]
    if not folders:
        raise UsageError(f"{paths[0]} is no folder of an autoencoder")
    return folders, [path for path in paths if not Path(path).is_dir()]

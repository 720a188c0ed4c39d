"""Single features against known concepts: the statistic, the choice, the tokens."""

import json

import pytest
import torch
from conftest import tiny_policy
from small_world import word_policy
from typer.testing import CliRunner

from dlmctl.cli import app
from dlmctl.models.attention import plain_rows
from dlmctl.models.blocks import block_outputs
from dlmctl.models.saving import save_policy
from dlmctl.records.errors import DataError, MissingInputError
from dlmctl.records.jsonl import Record, dump
from dlmctl.report.auroc import auroc, average_ranks
from dlmctl.sae.corpus import MaskLaw, documents, masked_corpus
from dlmctl.sae.evaluation.halves import Half, halves
from dlmctl.sae.evaluation.sentences import Tokens, collect, sentence_labels, token_sentences
from dlmctl.sae.evaluation.single import (
    baseline_methods,
    best_features,
    direction_method,
    result_rows,
    sae_method,
)
from dlmctl.sae.formats.folders import SavedSae, find_saes, write_sae
from dlmctl.sae.topk import TopKSae
from dlmctl.tasks.sources import prompts


def share_of_pairs(scores, present):
    """AUROC as it is defined: a pair in order counts one, a tie one half."""
    pairs = [(a, b) for a in scores[present].tolist() for b in scores[~present].tolist()]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_is_the_share_of_pairs_in_order(levels):
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (7, 40), generator=generator).float()
    scores[3] = 0.0
    present = torch.rand(5, 40, generator=generator) < 0.3
    found = auroc(scores, present)
    for f in range(7):
        for v in range(5):
            assert found[f, v].item() == pytest.approx(share_of_pairs(scores[f], present[v]))
    assert found[3].tolist() == [0.5] * 5


def test_equal_scores_share_their_mean_rank():
    assert average_ranks(torch.tensor([[5.0, 1.0, 5.0, -2.0, 5.0]])).tolist() == [[4, 2, 4, 1, 4]]
    assert average_ranks(torch.tensor([[-torch.inf, 3.0]])).tolist() == [[1, 2]]


def half(states, sentence, present):
    document = torch.arange(len(present[0]))
    return Half(states, torch.tensor(sentence), torch.tensor(present), document)


def test_a_sentence_scores_as_its_strongest_token_under_latents_and_directions():
    torch.manual_seed(1)
    sae = TopKSae(4, 9, 2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    states, sentence = torch.randn(7, 4), [2, 0, 1, 1, 0, 2, 2]
    found = half(states, sentence, [[True, False, True]])
    dense = sae.encode(states).dense(9)
    wanted = torch.tensor([4, 0, 4, 8])
    with torch.no_grad():
        latents = sae_method(sae).scores(found)(wanted)
    directions = torch.randn(3, 4)
    method = direction_method("x", directions, True)
    products = method.scores(found)(torch.arange(6))
    for s in range(3):
        rows = [n for n, owner in enumerate(sentence) if owner == s]
        torch.testing.assert_close(latents[:, s], dense[rows].amax(0)[wanted])
        signed = states[rows] @ torch.cat([directions, -directions]).T
        torch.testing.assert_close(products[:, s], signed.amax(0))


def planted(documents_of, seed=0):
    """Tokens whose coordinate 3 is low where a value is present, and noise elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    values = [{"tone": "good" if s % 3 == 0 else "bad"} for s in range(documents_of * 4)]
    sentence = torch.arange(len(values)).repeat_interleave(3)
    states = torch.randn(len(sentence), 8, generator=generator)
    states[:, 3] -= 6 * torch.tensor([v["tone"] == "good" for v in values])[sentence]
    document = torch.arange(len(values)) // 4
    return Tokens(states, sentence), document, values


def test_the_planted_coordinate_is_found_with_its_sign_and_chunks_change_nothing(monkeypatch):
    both = halves(*planted(30), torch.device("cpu"))
    assert both.names == [("tone", "good"), ("tone", "bad")]
    assert both.first.present.shape == both.second.present.shape == (2, 60)
    neurons = direction_method("neurons", torch.eye(8), True)
    rows = result_rows(neurons, both)
    assert [(r["feature"], r["sign"]) for r in rows[:2]] == [(3, -1), (3, 1)]
    assert min(r["auroc"] for r in rows) > 0.99
    assert (rows[0]["positives"], rows[0]["sentences"]) == (20, 60)
    assert rows[2]["clear"] == 1.0
    monkeypatch.setattr("dlmctl.sae.evaluation.single.NUMBERS_PER_CHUNK", 3 * 90)
    assert result_rows(neurons, both) == rows


def test_the_best_of_many_random_features_is_no_better_than_chance_where_it_was_not_chosen():
    tokens, document, values = planted(40)
    noise = tokens._replace(states=torch.randn(tokens.states.shape))
    both = halves(noise, document, values, torch.device("cpu"))
    first = both.first
    for method in baseline_methods(first, 500, seed=1):
        every = auroc(method.scores(first)(torch.arange(method.features)), first.present)
        judged = torch.tensor([e.value for e in best_features(method, first, both.second).auroc])
        assert every.max() > 0.57  # what it would look like without a second half
        assert (judged - 0.5).abs().max() < 4 * 0.067  # standard error of 27 and 53 sentences


def test_baselines_are_as_many_as_the_width_or_the_latents():
    first = halves(*planted(30), torch.device("cpu")).first
    pca, neurons, drawn = baseline_methods(first, 50, seed=3)
    assert [m.features for m in (pca, neurons, drawn)] == [16, 16, 50]
    assert [m.name for m in (pca, neurons, drawn)] == ["pca", "neurons", "random"]
    # The first principal direction is that of the largest variance, the planted one.
    scores = pca.scores(first)(torch.tensor([0, 8]))
    assert auroc(scores, first.present).max() > 0.99


def test_sentences_without_a_token_that_counts_are_left_out():
    tokens, document, values = planted(30)
    kept = tokens.sentence >= 8
    fewer = Tokens(tokens.states[kept], tokens.sentence[kept])
    both = halves(fewer, document, values, torch.device("cpu"))
    assert (both.first.present.shape[1], both.second.present.shape[1]) == (56, 56)
    with pytest.raises(DataError, match="no value of a concept"):
        halves(tokens, torch.zeros_like(document), values, torch.device("cpu"))


def spans_of(policy, document):
    """The text that the tokens of each sentence decode to."""
    places = token_sentences(document, policy)
    return [
        policy.decode([i for i, place in zip(document.ids, places, strict=True) if place == n])
        for n in range(len(document.record["sentences"]))
    ]


def test_tokens_belong_to_the_sentence_that_their_characters_are_in():
    policy = word_policy()
    records = list(prompts("concepts", limit=20))
    for document in documents(records, policy, 2048):
        text, labels = document.record["completion"], document.record["sentences"]
        assert spans_of(policy, document) == [text[s["start"] : s["end"]] for s in labels]
        assert token_sentences(document, policy)[:2] == [-1, -1]  # the prompt


def test_tokens_that_were_sampled_are_placed_by_decoding_them():
    policy = tiny_policy()
    labels = [{"start": 0, "end": 2, "x": 1}, {"start": 3, "end": 5, "x": 2}]
    ids = [*policy.encode_text("01234"), policy.eos_id, policy.eos_id]
    record = Record(prompt="0=", completion="01234", sentences=labels)
    record["tokens"] = {"prompt": [4, 4], "completion": ids}
    [document] = documents([record], policy, 99)
    assert token_sentences(document, policy) == [-1, -1, 0, 0, -1, 1, 1, -1, -1]
    [cut] = documents([record], policy, 4)
    assert token_sentences(cut, policy) == [-1, -1, 0, 0]
    [plain] = documents([Record(text="01234", sentences=labels)], policy, 99)
    assert token_sentences(plain, policy) == [0, 0, -1, 1, 1]


@pytest.mark.parametrize(
    "sentences",
    [None, [3], [{"start": 0}], [{"start": 2, "end": 2}], [{"start": 0, "end": 2}] * 2],
)
def test_labels_that_make_no_sense_are_refused(sentences):
    record = Record(sentences=sentences)
    record.where = "f.jsonl:3"
    with pytest.raises(DataError, match=r"f\.jsonl:3: field 'sentences'"):
        sentence_labels(record)


def test_collected_activations_are_those_of_the_tokens_in_their_sentences():
    policy = word_policy()
    law = MaskLaw(0.2, 0.6, seed=3)
    stream = list(documents(prompts("concepts", limit=7), policy, 2048))
    places = [(0, "mask"), (1, "unmask"), (1, "clean")]
    found = collect(stream, policy, places, law, batch_size=3)
    assert (
        len(found.values) == len(found.document) == sum(len(d.record["sentences"]) for d in stream)
    )
    for number, document in enumerate(stream):
        # Numbers of sentences follow the batches, in which like lengths are together.
        of_document = (found.document == number).nonzero()[:, 0].tolist()
        labels = document.record["sentences"]
        assert [found.values[s] for s in of_document] == [
            {k: v for k, v in label.items() if k not in ("start", "end")} for label in labels
        ]
        [batch] = masked_corpus([document], policy, law, 1)
        row = torch.tensor(token_sentences(document, policy))
        # Alone a document has number 0 and other masks, so that hidden tokens are not compared.
        with torch.no_grad():
            states = block_outputs(policy, plain_rows(batch.ids, None), [1])[1][0]
        tokens = found.tokens[1, "clean"]
        for n, s in enumerate(of_document):
            expected = states[(row == n)]
            torch.testing.assert_close(
                tokens.states[tokens.sentence == s], expected, atol=1e-5, rtol=1e-4
            )
    both = [found.tokens[p].sentence for p in places[:2]]
    assert sum(map(len, both)) == len(found.tokens[1, "clean"].sentence)


def test_autoencoders_are_found_in_a_folder_of_them(tmp_path):
    saved = SavedSae(TopKSae(3, 6, 1), {"dlm_layer": 0})
    write_sae(saved, tmp_path / "a/layer-1")
    write_sae(saved, tmp_path / "a/.layer-2.partial-9")
    write_sae(saved, tmp_path / "a/layer-0", "dictionary_learning")
    assert find_saes([tmp_path / "a"]) == [tmp_path / "a/layer-0", tmp_path / "a/layer-1"]
    assert find_saes([tmp_path / "a/layer-1"]) == [tmp_path / "a/layer-1"]
    with pytest.raises(MissingInputError, match="holds no autoencoder"):
        find_saes([tmp_path / "a", tmp_path / "b"])


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A model of words, an autoencoder for it, and a corpus."""
    policy = word_policy()
    save_policy(policy, tmp_path / "model")
    torch.manual_seed(0)
    sae = TopKSae(16, 40, 4)
    with torch.no_grad():
        sae.W_dec.normal_()
        sae.W_enc.copy_(sae.W_dec.T)
    for positions in ("mask", "clean"):
        metadata = {"dlm_layer": 1, "dlm_positions": positions}
        write_sae(SavedSae(sae, metadata), tmp_path / f"saes/{positions}")
    rows = prompts("concepts", limit=120)
    (tmp_path / "t.jsonl").write_bytes(b"".join(map(dump, rows)))
    monkeypatch.chdir(tmp_path)
    return sae


def run(line):
    return CliRunner().invoke(app, line.split())


def test_the_command_writes_a_row_for_each_value_and_method_and_their_summaries(study):
    done = run("sae-probe saes t.jsonl -m model")
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 * 4 * (19 + 1)
    for place in ("clean", "mask"):
        of_sae = [row for row in rows if row["sae"] == f"saes/{place}"]
        assert {(r["layer"], r["k"], r["positions"]) for r in of_sae} == {(1, 4, place)}
        for method in ("sae", "pca", "neurons", "random"):
            *values, summary = [row for row in of_sae if row["method"] == method]
            aurocs = [row["auroc"] for row in values]
            assert summary["values"] == 19
            assert summary["auroc"] == pytest.approx(sum(aurocs) / 19)
            assert summary["clear"] == sum(a > 0.95 for a in aurocs) / 19
            assert len({row["sentences"] for row in values}) == 1
            assert all(0 < row["positives"] < row["sentences"] for row in values)
    assert run("sae-probe saes t.jsonl -m model").stdout == done.stdout


@pytest.mark.parametrize(
    ("metadata", "width", "code", "message"),
    [
        ({}, 16, 65, "does not say which layer"),
        ({"dlm_layer": 2}, 16, 2, "no layer 2"),
        ({"dlm_layer": 1}, 8, 65, "activations of width 8, model has 16"),
        ({"dlm_layer": 1, "dlm_positions": "some"}, 16, 65, "positions 'some'"),
    ],
)
def test_autoencoders_that_do_not_fit_the_model_are_refused(study, metadata, width, code, message):
    from pathlib import Path

    write_sae(SavedSae(TopKSae(width, 20, 2), metadata), Path("other"))
    done = run("sae-probe other t.jsonl -m model")
    assert done.exit_code == code
    assert message in done.stderr


def test_a_record_without_labels_is_named_or_left_out(study):
    from pathlib import Path

    lines = Path("t.jsonl").read_text() + '{"prompt":"story:","completion":"the dog"}\n'
    Path("u.jsonl").write_text(lines)
    done = run("sae-probe saes/mask u.jsonl -m model")
    assert done.exit_code == 65
    assert "u.jsonl:121: field 'sentences' is missing" in done.stderr
    skipped = run("sae-probe saes/mask u.jsonl -m model --on-error skip")
    assert skipped.stdout == run("sae-probe saes/mask t.jsonl -m model").stdout


def test_texts_are_read_in_the_context_of_the_training(study):
    from pathlib import Path

    found = {}
    for context in (24, 2048):
        metadata = {"dlm_layer": 1, "dlm_positions": "mask", "context_size": context}
        write_sae(SavedSae(study, metadata), Path(f"saes{context}/mask"))
        for given in ("", " --context 24"):
            done = run(f"sae-probe saes{context} t.jsonl -m model{given}")
            assert done.exit_code == 0, done.stderr
            found[context, given] = done.stdout.replace(f"saes{context}", "saes")
    assert found[24, ""] == found[24, " --context 24"] == found[2048, " --context 24"]
    assert found[24, ""] != found[2048, ""]
    refused = run("sae-probe saes24 saes2048 t.jsonl -m model")
    assert refused.exit_code == 2
    assert "give --context" in refused.stderr

"""Which records make an optimizer step."""

import pytest

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record
from dlmctl.rl.batches import (
    CutRoundError,
    check_on_policy,
    of_one_model,
    other_distribution,
    step_batches,
)


def samples(prompt, count, of=None, round_=None, round_size=None):
    place = {"samples": of or count}
    if round_ is not None:
        place |= {"round": round_, "round_size": round_size}
    return [Record(id=prompt, sample=i, rollout=place) for i in range(count)]


def test_a_step_takes_whole_groups():
    stream = [r for p in "abcde" for r in samples(p, 3)]
    batches = list(step_batches(stream, 2))
    assert [[g[0]["id"] for g in b.groups] for b in batches] == [["a", "b"], ["c", "d"], ["e"]]
    assert all(len(g) == 3 for b in batches for g in b.groups)
    assert [b.partial for b in batches] == [0, 0, 0]


def test_a_step_does_not_wait_for_the_group_behind_it():
    read = []

    def stream():
        for record in [r for p in "ab" for r in samples(p, 2)]:
            read.append(record)
            yield record

    next(step_batches(stream(), 1))
    assert len(read) == 2


def test_the_same_prompt_twice_makes_two_groups():
    batches = list(step_batches(samples("a", 2) + samples("a", 2), 8))
    assert [len(g) for g in batches[0].groups] == [2, 2]


def test_groups_that_lack_samples_are_counted():
    [batch] = step_batches(samples("a", 2, of=3) + samples("b", 3), 8)
    assert batch.partial == 1


def test_a_round_ends_with_a_step_even_if_it_is_short():
    stream = samples("a", 2, round_=0, round_size=6) + samples("b", 2, round_=0, round_size=6)
    stream += samples("c", 2, round_=0, round_size=6) + samples("d", 2, round_=1, round_size=2)
    batches = list(step_batches(stream, 2))
    assert [[g[0]["id"] for g in b.groups] for b in batches] == [["a", "b"], ["c"], ["d"]]
    assert [b.finished_round for b in batches] == [None, 0, 1]


def test_failed_records_count_for_the_round_and_not_for_the_step():
    stream = samples("a", 2, round_=0, round_size=2)
    stream[1]["error"] = {"message": "no"}
    [batch] = step_batches(stream, 4)
    assert [len(g) for g in batch.groups] == [1]
    assert batch.finished_round == 0
    assert batch.partial == 1


def test_records_of_other_tools_are_grouped_by_id():
    stream = [Record(id=x) for x in "aabbb"]
    [batch] = step_batches(stream, 4)
    assert [len(g) for g in batch.groups] == [2, 3]


def test_a_round_whose_stream_ends_early_is_not_trained_on_to_its_end():
    stream = samples("a", 2, round_=3, round_size=6) + samples("b", 1, of=2, round_=3, round_size=6)
    batches = step_batches(stream, 1)
    assert [g[0]["id"] for g in next(batches).groups] == ["a"]
    with pytest.raises(CutRoundError, match="within round 3, after 3 of 6"):
        next(batches)


def test_a_round_that_was_cut_divides_no_group_of_the_next():
    stream = samples("a", 2, round_=0, round_size=4) + samples("b", 1, of=2, round_=0, round_size=4)
    stream += samples("c", 2, round_=1, round_size=4) + samples("d", 2, round_=1, round_size=4)
    batches = list(step_batches(stream, 8))
    assert [[(g[0]["id"], len(g)) for g in b.groups] for b in batches] == [
        [("a", 2), ("b", 1)],
        [("c", 2), ("d", 2)],
    ]
    assert [b.finished_round for b in batches] == [None, 1]


def test_a_group_is_whole_when_its_failed_samples_came():
    stream = samples("a", 2) + samples("b", 2)
    stream[1]["error"] = {}
    read = []

    def watched():
        for record in stream:
            read.append(record)
            yield record

    assert [len(g) for g in next(step_batches(watched(), 1)).groups] == [1]
    assert len(read) == 2


def test_a_round_size_that_is_no_number_is_refused():
    with pytest.raises(DataError, match=r"'rollout\.round_size' is str, expected int"):
        list(step_batches([Record(id="a", rollout={"round_size": "9"})], 1))


def of_round(number, revision, lag=0):
    place = {"samples": 1, "round": number, "round_size": 1, "max_lag": lag, "revision": revision}
    record = Record(id="a", sample=0, rollout=place)
    record.where = "x.jsonl:4"
    [batch] = step_batches([record], 1)
    return batch


def test_only_completions_of_the_own_newest_weights_are_taken():
    check_on_policy(of_round(2, "new"), ["old", "new"], 2)
    with pytest.raises(DataError, match=r"x\.jsonl:4: sampled from weights old"):
        check_on_policy(of_round(2, "old"), ["old", "new"], 2)
    with pytest.raises(DataError, match="within 1 rounds"):
        check_on_policy(of_round(2, "oldest", lag=1), ["oldest", "old", "new"], 2)
    check_on_policy(of_round(2, "old", lag=1), ["old", "new"], 2)


@pytest.mark.parametrize(
    ("lag", "revision", "told"),
    [("1", "new", "max_lag' is '1'"), (-2, "new", "max_lag' is -2"), (0, ["new"], "on' is list")],
)
def test_what_says_otherwise_where_it_is_from_is_refused(lag, revision, told):
    with pytest.raises(DataError, match=rf"x\.jsonl:4: field 'rollout\..*{told}"):
        check_on_policy(of_round(2, revision, lag=lag), ["new"], 2)


def test_a_round_that_is_not_the_next_one_is_refused():
    with pytest.raises(DataError, match=r"a completion of round 5; .* resumes with round 2"):
        check_on_policy(of_round(5, "new"), ["new"], 2)


def test_records_outside_a_training_loop_come_from_any_policy():
    [batch] = step_batches(samples("a", 2), 1)
    check_on_policy(batch, ["new"], 7)


@pytest.mark.parametrize(
    ("rollout", "way"),
    [
        ({"temperature": 1.0, "sampler": {"top_p": 1.0, "top_k": 0}}, None),
        ({}, None),
        ({"temperature": 0.9}, "temperature 0.9"),
        ({"temperature": 0}, "temperature 0"),
        ({"temperature": 1, "sampler": {"top_p": 0.5, "top_k": 9}}, "top-p 0.5 and top-k 9"),
        ({"sampler": "unknown", "temperature": 2}, "temperature 2"),
    ],
)
def test_a_completion_of_another_distribution_is_told(rollout, way):
    assert other_distribution(Record(id="a", rollout=rollout)) == way


def sampled(*models, **more):
    rows = [Record(id=n, rollout={"model": m} if m else {}, **more) for n, m in enumerate(models)]
    for n, row in enumerate(rows, 1):
        row.where = f"x.jsonl:{n}"
    return rows


def test_the_model_that_all_records_name_is_trained():
    rows = [*sampled("m", "m", None), Record(error={}, rollout={"model": "other"})]
    rows.append(Record(id=9, rollout={"model": "run/step-1", "round": 1}))
    assert list(of_one_model(rows, "m")) == rows
    stream = of_one_model(sampled("m", "m", "other"), "m")
    assert [next(stream)["id"], next(stream)["id"]] == [0, 1]
    with pytest.raises(
        DataError, match=r"^x\.jsonl:3: sampled from other, .* from m: say with --mod"
    ):
        next(stream)
    with pytest.raises(DataError, match=r"^x\.jsonl:2: sampled from m, .* of no model"):
        list(of_one_model(sampled(None, "m"), None))

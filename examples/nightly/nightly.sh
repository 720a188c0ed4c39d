#!/bin/bash
# Evaluates a model and says nothing while all is well, as cron wants it.
#
#   nightly.sh MODEL LEAST      e.g. nightly.sh runs/a 0.35
#
# A row for each night goes to nightly/history.jsonl, the verified completions to
# nightly/DAY.verified.jsonl, and what a CI system shows to nightly/DAY.xml. The first night is the
# baseline, nightly/baseline.jsonl. If the accuracy is below LEAST, or significantly worse than the
# baseline's, it prints what it found and ends with 1. Started again after a night that was cut, it
# goes on where that was.
set -euo pipefail
model=$1 least=$2 count=${COUNT:-512} day=${DAY:-$(date +%F)}
verified=nightly/$day.verified.jsonl
mkdir -p nightly

{
    dlmctl prompts sudoku --split test -n "$count" --seed 100 -o nightly/prompts.jsonl &&
    dlmctl rollout -q -m "$model" -n 1 --temperature 0 -b 256 --resume -o "nightly/$day.jsonl" nightly/prompts.jsonl &&
    dlmctl verify -q "nightly/$day.jsonl" -o "$verified"
} 2> nightly/log || { status=$?; cat nightly/log; exit $status; }
[ -e nightly/baseline.jsonl ] || cp "$verified" nightly/baseline.jsonl

dlmctl stats -q "$verified" > nightly/row.jsonl
dlmctl stats -q --compare nightly/baseline.jsonl --fail-worse accuracy --fail-under accuracy="$least" \
    --junit "nightly/$day.xml" "$verified" > nightly/compared.jsonl 2> nightly/log ||
    { status=$?; cat nightly/row.jsonl nightly/compared.jsonl nightly/log; }
jq -c --arg day "$day" --arg model "$model" '{day: $day, model: $model} + .' nightly/row.jsonl >> nightly/history.jsonl
exit ${status:-0}

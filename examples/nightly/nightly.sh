#!/bin/bash
# Evaluates a model and says nothing while all is well, as cron wants it.
#
#   nightly.sh MODEL LEAST      e.g. nightly.sh runs/a 0.35
#
# A row for each night goes to nightly/history.jsonl, the completions to nightly/DAY.jsonl. Below
# LEAST it prints what it found and ends with 1. Started again after a night that was cut, it goes on
# where that was.
set -euo pipefail
model=$1 least=$2 count=${COUNT:-512} day=${DAY:-$(date +%F)}
mkdir -p nightly

dlmctl prompts sudoku --split test -n "$count" --seed 100 -o nightly/prompts.jsonl
dlmctl rollout -q -m "$model" -n 1 --temperature 0 -b 256 --resume -o "nightly/$day.jsonl" nightly/prompts.jsonl 2> nightly/log ||
    { cat nightly/log; exit 1; }
dlmctl verify -q "nightly/$day.jsonl" | dlmctl stats --fail-under accuracy="$least" > nightly/row.jsonl 2> nightly/log ||
    { status=$?; cat nightly/row.jsonl nightly/log; }
jq -c --arg day "$day" --arg model "$model" '{day: $day, model: $model} + .' nightly/row.jsonl >> nightly/history.jsonl
exit ${status:-0}

# Steering success against amplitude: each value of a concept by the feature that tells it best.
#
#   steer.sh MODEL FLUENCY DIRECTORY "CONCEPT=VALUE …" "AMPLITUDE …"
#
# DIRECTORY holds saes/ and probe.jsonl; steering.jsonl comes into it, a row for each value and
# amplitude. FLUENCY is the model that perplexities are of.

set -euo pipefail
model=$1 fluency=$2 directory=$3 values=$4 amplitudes=$5
# A text that begins with a mark has no words for it: those of the corpus begin with a word.
words='jq -c .completion|=sub("^[^a-z]+";"")'
sample="-q -m $model -n 1 --temperature 0.7 -b 64 --seed 5"
work=$directory/steering
mkdir -p "$work"
rm -f "$work"/*

for pair in $values; do
    best=$(jq -r -s --arg pair "$pair" '
        map(select(.method == "sae" and "\(.concept)=\(.value)" == $pair and .sign == 1))
        | max_by(.auroc) | "\(.sae):\(.feature) \(.auroc)"' "$directory/probe.jsonl")
    dlmctl prompts concepts --split test -n 64 --seed 9 --want "$pair" -o "$work/prompts.jsonl"
    dlmctl rollout $sample "$work/prompts.jsonl" | $words | dlmctl verify > "$work/plain.jsonl"
    for amplitude in $amplitudes; do
        dlmctl rollout $sample --steer "${best% *}=$amplitude" "$work/prompts.jsonl"
    done | $words | dlmctl verify |
        dlmctl sae-steering -q --baseline "$work/plain.jsonl" --concept-from reward --fluency "$fluency" |
        jq -c 'select(.row == "amplitude")' > "$work/rows.jsonl"
    jq -c --arg value "${pair#*=}" --argjson auroc "${best#* }" '. + {value: $value, auroc: $auroc}' \
        "$work/rows.jsonl" >> "$work/steering.jsonl"
done
mv "$work/steering.jsonl" "$directory/steering.jsonl"

# Fronts of steering: what a feature of each value gains, and what that costs in perplexity.
#
#   steer.sh MODEL "SAE …" JUDGE LABELLED DIRECTORY "CONCEPT …" "AMPLITUDE …" "SCOPE …" PROMPTS
#
# Of all autoencoders, the feature whose step raises the probability of a value's words the most on half
# of the LABELLED texts, and the one that tells the value best, are steered. Amplitudes are shares of the
# norm of the residual stream. Rows of `sae-steering` go to standard output.

set -euo pipefail
model=$1 saes=$2 judge=$3 labelled=$4 directory=$5 concepts=$6 amplitudes=$7 scopes=$8 prompts=$9
mkdir -p "$directory"
sample="-q -m $model -n 1 -b 64 --seed 5 --dtype ${DTYPE:-auto} ${SAMPLING-}"

[ -e "$directory/probe.jsonl" ] || {
    dlmctl sae-probe -q $saes "$labelled" -m "$model" --measure output --choose both --candidates 4 \
        $(printf -- '--concept %s ' $concepts) > "$directory/probe.part"
    mv "$directory/probe.part" "$directory/probe.jsonl"
}
jq -c -s 'map(select(.method == "sae" and .feature != null)) | group_by([.chosen_by, .concept, .value])[]
    | .[0].chosen_by as $by | max_by(if $by == "output" then .first_half_effect else .auroc end)' \
    "$directory/probe.jsonl" > "$directory/chosen.jsonl"
dlmctl prompts concepts -q --split test -n "$prompts" --seed 9 -o "$directory/asked.jsonl"
dlmctl rollout $sample "$directory/asked.jsonl" > "$directory/plain.jsonl"
# A feature that is chosen by both is steered once, and has rows for both.
jq -r -s 'group_by([.concept, .value, .sae, .feature])[]
    | [(map(.chosen_by) | join(" ")), (.[0] | .concept, .value, .sae, .feature, .effect, .auroc)] | @tsv' "$directory/chosen.jsonl" |
    while IFS=$'\t' read -r chosen concept value sae feature effect auroc; do
        judged() { jq -c --arg concept "$concept" --arg value "$value" '.wanted = {($concept): $value}' | dlmctl verify -q; }
        judged < "$directory/plain.jsonl" > "$directory/baseline.jsonl"
        for scope in $scopes; do
            for amplitude in $amplitudes; do
                dlmctl rollout $sample --steer "$sae:$feature=$amplitude" --steer-unit norm --steer-scope "$scope" \
                    "$directory/asked.jsonl"
            done | judged |
                dlmctl sae-steering -q --baseline "$directory/baseline.jsonl" --concept-from reward --fluency "$judge" |
                jq -c --arg chosen "$chosen" --arg concept "$concept" --arg value "$value" --argjson effect "$effect" \
                    --argjson auroc "$auroc" '. + {chosen_by: ($chosen | split(" ") | .[]), concept: $concept, value: $value, effect: $effect, auroc: $auroc}'
        done
    done

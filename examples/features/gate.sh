# Is unsteered text like the corpus? The share of each topic in the texts of a model, and how far it is
# from that of unseen stories:
#
#   gate.sh MODEL STUDY TEXTS

set -euo pipefail
asked="dlmctl prompts concepts -q --words 4 --split test -n $3 --seed 9 --want topic=sport"
shares='.verdict.concepts.expressions.topic | add as $n | to_entries[] | {topic: .key, share: (.value / ([$n, 1] | max))}'
mean='group_by(.topic)[] | {topic: .[0].topic, share: (map(.share) | add / length)}'
$asked | dlmctl verify -q | jq -c "$shares" | jq -s -c "$mean" > "$1.corpus"
$asked | dlmctl rollout -q -m "$1" -n 1 -b 128 --seed 5 --dtype "${DTYPE:-auto}" ${SAMPLING-} | dlmctl verify -q | jq -c "$shares" | jq -s -c "$mean" |
    jq -c --arg study "$2" --slurpfile corpus "$1.corpus" '.topic as $t | .share as $s
        | {study: $study, topic: $t, share: $s, off: ($s - ($corpus[] | select(.topic == $t) | .share))}'

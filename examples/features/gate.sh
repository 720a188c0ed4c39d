# Is unsteered text like the corpus? The share of each topic in the texts of a model, its standard error
# over texts, and how far it is from that of 2,000 unseen stories:
#
#   gate.sh MODEL STUDY TEXTS

set -euo pipefail
asked() { dlmctl prompts concepts -q --words 4 --split test -n "$1" --seed 9 --want topic=sport; }
shares='.verdict.concepts.expressions.topic | add as $n | to_entries[] | {topic: .key, share: (.value / ([$n, 1] | max))}'
mean='group_by(.topic)[] | map(.share) as $x | ($x | add / length) as $mean
    | {topic: .[0].topic, share: $mean, share_se: (($x | map((. - $mean) * (. - $mean)) | add) / length / length | sqrt)}'
asked 2000 | dlmctl verify -q | jq -c "$shares" | jq -s -c "$mean" > "$1.corpus"
asked "$3" | dlmctl rollout -q -m "$1" -n 1 -b 128 --seed 5 --dtype "${DTYPE:-auto}" ${SAMPLING-} | dlmctl verify -q | jq -c "$shares" | jq -s -c "$mean" |
    jq -c --arg study "$2" --slurpfile corpus "$1.corpus" '.topic as $t | .share as $s
        | {study: $study} + . + {off: ($s - ($corpus[] | select(.topic == $t) | .share))}'

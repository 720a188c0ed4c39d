#!/bin/sh
# Reinforcement learning of a diffusion language model, from nothing to a plot:
#
#   sh examples/quickstart.sh [RUN]
#
# Creates an environment, installs dlmctl, solves unseen 4x4 Sudokus with the built-in model, trains
# it with RSPO in one pipe, solves them again and draws the curve. SEED, ROUNDS change the run.
set -eu
cd "$(dirname "$0")/.."
extras=plot
. examples/environment.sh

run=${1:-runs/quickstart}
seed=${SEED:-1}
rounds=${ROUNDS:-100}
mkdir -p "$(dirname "$run")"

solve() {
    dlmctl prompts sudoku --split test -n 512 --seed 100 |
        dlmctl rollout -m "$1" -n 1 --temperature 0 --batch-size 256 |
        dlmctl verify | dlmctl stats
}

echo "before: unseen puzzles that builtin:puzzles solves, greedy" >&2
solve builtin:puzzles | tee "$run.before.jsonl"

dlmctl rollout --follow "$run" --rounds "$rounds" -n 8 --prompts 32 --temperature 1 \
        --batch-size 256 --seed "$seed" |
    dlmctl verify |
    dlmctl update --algo rspo -k 2 -o "$run" --lr 3e-4 --schedule cosine --total-steps "$rounds" \
        --grad-norm 1 --weight-decay 0 --batch-size 256 --seed "$seed" > /dev/null

echo "after $rounds rounds of RSPO" >&2
solve "$run" | tee "$run.after.jsonl"
dlmctl plot "$run/metrics.jsonl" -y reward -y kl -y flipped --smooth 10 -o "$run.png"
echo "curves: $run.png" >&2

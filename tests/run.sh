#!/bin/sh
# Environment, install, lint, types, tests:  sh tests/run.sh [PYTEST OPTIONS]
set -eu
cd "$(dirname "$0")/.."
extras=dev
. examples/environment.sh
export OMP_NUM_THREADS=1
ruff check .
ruff format --check .
mypy
exec pytest --durations 20 --dist worksteal -n "${DLMCTL_TEST_WORKERS:-auto}" "$@"

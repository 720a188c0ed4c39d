# Creates a virtual environment and installs dlmctl into it; sourced by quickstart.sh and tests/run.sh.
#
#   extras=plot; . examples/environment.sh
#
# DLMCTL_VENV is where it goes (.venv). TORCH is what is installed first: on Linux, PyPI's torch is
# the CUDA build. For a small CPU build set
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

venv=${DLMCTL_VENV:-.venv}
if [ ! -x "$venv/bin/python" ]; then
    echo "creating $venv" >&2
    "${PYTHON:-python3}" -m venv "$venv"
fi
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    "$venv/bin/python" -m pip install --quiet "${TORCH:-torch==2.13.0}"
fi
"$venv/bin/python" -m pip install --quiet --editable ".[$extras]"
PATH=$(cd "$venv/bin" && pwd):$PATH
export PATH

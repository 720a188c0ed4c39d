#!/bin/sh
# Builds sdist and wheel, and uses the installed wheel where there is no source tree:
#
#   sh tests/install/run.sh [NEW FOLDER OUTSIDE OF THE TREE]
#
# The dependencies are those of DLMCTL_VENV (.venv), which tests/run.sh makes. dlmctl itself may be
# there in editable form; what runs is the wheel alone, and opening a file of the source tree is an
# error.
set -eu
cd "$(dirname "$0")/../.."
root=$PWD
venv=${DLMCTL_VENV:-.venv}
[ -x "$venv/bin/python" ] || { echo "there is no $venv: sh tests/run.sh makes it" >&2 && exit 2; }
git rev-parse --is-inside-work-tree > /dev/null 2>&1 ||
    { echo "no git repository, whose files the wheel is compared with: nothing is checked" >&2 && exit 0; }
python=$(cd "$venv/bin" && pwd)/python
made=${1:-$(mktemp -d)}
mkdir -p "$made"
made=$(cd "$made" && pwd)
case $made/ in
    "$root"/*) echo "$made is within the source tree" >&2 && exit 2 ;;
esac
[ $# -gt 0 ] || trap 'rm -rf "$made"' EXIT
unset PYTHONPATH
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DLMCTL_DEVICE=cpu

# A fresh copy: old build folders would end up in the wheel.
mkdir "$made/source"
git ls-files -z --cached --others --exclude-standard |
    xargs -0 sh -c 'for file; do [ ! -f "$file" ] || printf "%s\0" "$file"; done' sh |
    xargs -0 cp --parents -t "$made/source"
"$python" -m venv "$made/builder"
"$made/builder/bin/python" -m pip install --quiet build
"$made/builder/bin/python" -m build --outdir "$made/dist" "$made/source" > "$made/build.log" 2>&1 ||
    { cat "$made/build.log" >&2; exit 1; }
"$python" tests/install/contents.py "$root" "$made/dist"

# Folders that a .pth file names are searched, but their own .pth files, such as that of an editable
# installation, are not read.
"$python" -m venv "$made/clean"
clean="$made/clean/bin"
"$clean/python" -m pip install --quiet --no-deps "$made"/dist/*.whl
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
site=$("$clean/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp tests/install/outside.py "$site"
printf '%s\n' "$packages" 'import outside' > "$site/outside.pth"
export DLMCTL_SOURCE="$root" DLMCTL_PACKAGES="$packages"

mkdir "$made/here"
cd "$made/here"
PATH=$clean:$PATH
if PYTHONPATH=$root python -c 'import dlmctl' 2> refused; then
    echo "importing the source tree was not refused" >&2
    exit 1
fi
grep -q "belongs to the source tree" refused
sh "$root/tests/install/tour.sh" "$site"
echo "sdist and wheel are complete, and the installed dlmctl works on its own" >&2

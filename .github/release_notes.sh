#!/bin/sh
# The section of CHANGELOG.md about a version:  sh .github/release_notes.sh VERSION
set -eu
cd "$(dirname "$0")/.."
notes=$(awk -v "version=$1" '
    /^## / { inside = ($2 == version); next }
    inside { print }
' CHANGELOG.md)
if [ -z "$notes" ]; then
    echo "CHANGELOG.md has no section '## $1'" >&2
    exit 1
fi
printf '%s\n' "$notes"

# The first minutes with an installed dlmctl, in the present folder:  sh tour.sh SITE_PACKAGES
set -eu
site=$1

python -c 'import dlmctl, sys; sys.exit(not dlmctl.__file__.startswith(sys.argv[1]))' "$site"
version=$(python -c 'from importlib.metadata import version; print(version("dlmctl"))')
test "$(dlmctl --version)" = "dlmctl $version"
dlmctl --help > help
grep -q rollout help
dlmctl doctor --json > doctor
grep -q '"name":"builtin:puzzles","state":"ok"' doctor

dlmctl prompts sudoku -n 2 > prompts
dlmctl rollout -n 2 prompts > samples
dlmctl verify samples > verified
dlmctl stats verified > stats
grep -q '"completions":4' stats
dlmctl update --algo rspo -o runs/a verified > updated
test -s runs/a/latest/model.safetensors
dlmctl view --html page.html verified
test -s page.html

printf '%s\n' '{"task":"code","completion":"def one(): return 1","tests":["assert one() == 1"]}' |
    dlmctl verify --allow-unconfined > judged
grep -q '"reward":1.0' judged

_DLMCTL_COMPLETE=source_bash dlmctl > completion
grep -q complete_bash completion
COMP_WORDS="dlmctl roll" COMP_CWORD=1 _DLMCTL_COMPLETE=complete_bash dlmctl > completed
grep -qx rollout completed
test -s "$(dirname "$(command -v dlmctl)")/../share/man/man1/dlmctl.1"

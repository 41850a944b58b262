#!/usr/bin/env bash
# Sets up an environment, checks style and types, and runs the tests. All other arguments go to pytest.
#   --fast   style, and only the tests of tests/fast.txt
#   --style  no tests
source "$(dirname "${BASH_SOURCE[0]}")/../recipes/environment.sh"
mode=${1:-}
case $mode in --fast | --style) shift ;; esac
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
# The annotations of other versions of torch are other ones; the first time, mypy takes longer than half of the fast tests.
[ "$constraints" != constraints.txt ] || [ "$mode" = --fast ] || "$venv/bin/mypy"
[ "$mode" != --style ] || exit 0
[ "$mode" != --fast ] || set -- $(grep -v '^#' tests/fast.txt) "$@"
# One thread a worker: two cores and two workers, and figures that do not depend on the machine's threads.
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false exec "$venv/bin/python" -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu" "$@"

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
# One thread a worker, and figures that do not depend on the machine's threads. Three workers on two cores: a worker waits for
# the processes that it starts, and two leave a third of the cores' time unused.
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false exec "$venv/bin/python" -m pytest -q -n 3 --dist worksteal -m "not slow and not gpu" "$@"

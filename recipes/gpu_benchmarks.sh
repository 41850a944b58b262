#!/usr/bin/env bash
# Everything that docs/benchmarks asks of a GPU, in less than ten minutes: bash recipes/gpu_benchmarks.sh [OUTPUT_FOLDER]
# Peers that are installed are measured too: pip install "hf_efcp[bench]" ista-daslab-optimizers
# A part that fails does not stop the others; the exit status says whether one did.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-outputs/gpu_benchmarks}"
python="${PYTHON:-python3}"
mkdir -p "$out"
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
status=0

part() { # name, seconds it may take, command
  local name="$1" limit="$2"
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2> "$out/$name.err" | tee "$out/$name.md" || { echo "$name failed: $out/$name.err"; status=1; }
}
bench() { # name, seconds, arguments of hf-efcp bench
  local name="$1" limit="$2"
  shift 2
  part "$name" "$limit" "$python" -m hf_efcp.cli.main bench "$@" --device cuda --json "$out/$name.json"
}

ours=efcp_lowrank_mfac,efcp_sparse_mfac
bench bert_base_m128 60 bert-base --optim_args window_size=128
bench bert_base_m1024_peers 150 bert-base --optim "$ours" --optim_args window_size=1024 --peers
bench llama_1b_m128 60 llama-1b --dtype bfloat16 --optim "$ours" --optim_args window_size=128
bench llama_1b_m1024 90 llama-1b --dtype bfloat16 --optim "$ours" --optim_args window_size=1024
part step_profile 60 "$python" recipes/step_profile.py
part training_step 80 "$python" recipes/training_step.py --device cuda --json "$out/training_step.json"
plot=(); "$python" -c "import matplotlib" 2> /dev/null && plot=(--plot "$out/sweep.png")
bench sweep 90 --sweep --sweep_parameters 1e7,3e7,1e8,3e8,1e9 --sweep_windows 32,128,512,2048 --steps 4 "${plot[@]}"
exit "$status"

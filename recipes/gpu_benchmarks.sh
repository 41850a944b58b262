#!/usr/bin/env bash
# What docs/benchmarks asks of a GPU, in two parts of less than nine minutes each; for 78 GiB of the GPU's memory:
#   bash recipes/gpu_benchmarks.sh checks [FOLDER]     kernels against torch, what waits, compute-sanitizer
#   bash recipes/gpu_benchmarks.sh figures [FOLDER]    launches, times and bytes, beside other optimizers
# Results are in FOLDER/PART (default: outputs/gpu_benchmarks) and, as one archive, in FOLDER/PART.tar.gz. A command that fails does
# not stop the others; the last lines say what ran and what failed, and so does the exit status. PYTHON: the interpreter (python3).
# Peers that are installed are measured too: pip install "hf_efcp[bench]" ista-daslab-optimizers
# DRY_RUN=1: only print the commands, one a line: name, seconds it may take, command.
set -uo pipefail
which="${1:-}"
out="${2:+$(realpath -m "${2:-}")}"
cd "$(dirname "$0")/.."
out="${out:-$PWD/outputs/gpu_benchmarks}"
python="${PYTHON:-python3}"
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
ran=() failed=()

part() { # name, seconds it may take, command
  local name="$1" limit="$2" begin=$SECONDS status
  shift 2
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%s\t%s\t' "$name" "$limit"; printf '%q ' "$@"; echo
    return
  fi
  echo "== $name: $*"
  timeout -k 5 "$limit" "$@" 2> "$out/$which/$name.err" | tee "$out/$which/$name.md"
  status=${PIPESTATUS[0]}
  ran+=("$name")
  echo "-- $name: status $status, $((SECONDS - begin)) s of $limit" | tee -a "$out/$which/summary.txt"
  [ "$status" = 0 ] && return
  failed+=("$name")
  tail -n 5 "$out/$which/$name.err"
}
tests() { # name, seconds, arguments of pytest
  local name="$1" limit="$2"
  shift 2
  part "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider -m gpu "$@"
}
bench() { # name, seconds, arguments of hf-efcp bench
  local name="$1" limit="$2"
  shift 2
  part "$name" "$limit" "$python" -m hf_efcp.cli.main bench "$@" --json "$out/$which/$name.json"
}
profile() { # name, seconds, arguments of the recipe
  local name="$1" limit="$2"
  shift 2
  part "$name" "$limit" "$python" recipes/step_profile.py "$@"
}

ours=efcp_lowrank_mfac,efcp_sparse_mfac

checks() {
  local capability=90
  [ -n "${DRY_RUN:-}" ] || capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || capability=90
  part machine 20 "$python" -c 'import torch; from hf_efcp.bench.measuring import machine; print(machine(torch.device("cuda")))'
  part compile 90 "$python" tests/kernels/compile_kernels.py "$capability"
  bench launches 30 --launches bert-base --optim "$ours"
  tests steps 120 tests/optim/test_cuda.py
  tests graph_and_hook 70 tests/bench/test_measuring.py tests/engine/test_graph.py tests/distributed/test_factors_waits.py
  tests kernels 130 tests/kernels/test_on_gpu.py
  if [ -n "${DRY_RUN:-}" ] || command -v compute-sanitizer > /dev/null; then
    # Without torch's cache of memory, so that what lies beside a tensor belongs to nobody.
    part memcheck 65 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
      "$python" -m pytest -q -p no:cacheprovider -m gpu tests/kernels/test_on_gpu.py -k "float32 and 6 and 5-24-1024 or bfloat16 and int4 and mfac"
  else
    echo "-- memcheck: left out, compute-sanitizer is not installed" | tee -a "$out/$which/summary.txt"
  fi
}

figures() {
  local m
  for m in 32 128 1024; do
    bench "bert_base_m${m}_launches" 20 --launches bert-base --optim "$ours" --optim_args "window_size=$m"
  done
  for m in 32 128 1024; do # among the peers is fused AdamW
    bench "bert_base_m$m" 60 bert-base --optim "$ours" --optim_args "window_size=$m" --device cuda --peers
  done
  part bert_base_graph 40 env HF_EFCP_CUDA_GRAPH=1 "$python" -m hf_efcp.cli.main bench bert-base --optim "$ours" \
    --optim_args window_size=32 --device cuda --json "$out/$which/bert_base_graph.json"
  for m in 128 1024; do
    bench "llama_1b_m$m" 45 llama-1b --dtype bfloat16 --optim "$ours" --optim_args "window_size=$m" --device cuda
  done
  part training_step 45 "$python" recipes/training_step.py --device cuda --json "$out/$which/training_step.json"
  part training_step_graph 40 env HF_EFCP_CUDA_GRAPH=1 "$python" recipes/training_step.py --device cuda --precision bf16 \
    --json "$out/$which/training_step_graph.json"
  profile step_profile 45 --model bert-base --optim "$ours" # with a CUDA graph and without
}

case "$which" in
  checks | figures) ;;
  *)
    echo "usage: bash recipes/gpu_benchmarks.sh checks|figures [FOLDER]" >&2
    exit 2
    ;;
esac
[ -n "${DRY_RUN:-}" ] || { mkdir -p "$out/$which" && rm -f "$out/$which/summary.txt"; } || exit 1
"$which"
[ -n "${DRY_RUN:-}" ] && exit
printf 'ran: %s\nfailed: %s\n' "${ran[*]:-nothing}" "${failed[*]:-nothing}" | tee -a "$out/$which/summary.txt"
tar -czf "$out/$which.tar.gz" -C "$out" "$which" && echo "results: $out/$which.tar.gz"
[ ${#failed[@]} = 0 ]

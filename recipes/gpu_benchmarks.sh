#!/usr/bin/env bash
# What docs/benchmarks asks of a GPU, in two parts of less than nine minutes each; for 78 GiB of the GPU's memory:
#   bash recipes/gpu_benchmarks.sh checks [FOLDER]     kernels against torch, what waits, compute-sanitizer
#   bash recipes/gpu_benchmarks.sh figures [FOLDER]    launches, times and bytes, beside other optimizers
# The checks run side by side, in six processes with pytest-xdist, and take two minutes on 16 cores; the figures one after the other.
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

part() { # name, seconds it may take, command
  local name="$1" limit="$2" begin=$SECONDS status
  shift 2
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%s\t%s\t' "$name" "$limit"; printf '%q ' "$@"; echo
    return
  fi
  timeout -k 5 "$limit" "$@" > "$out/$which/$name.md" 2> "$out/$which/$name.err"
  status=$?
  echo "$name" >> "$out/$which/ran.txt"
  [ "$status" = 0 ] || echo "$name" >> "$out/$which/failed.txt"
  echo "-- $name: status $status, $((SECONDS - begin)) s of $limit" | tee -a "$out/$which/summary.txt"
  # At once, so that nothing of other parts stands between.
  printf '%s\n' "== $name: $*" "$(tail -n 60 "$out/$which/$name.md")" "$([ "$status" = 0 ] || tail -n 5 "$out/$which/$name.err")"
}
beside() { # the same as `part`, while the others go on
  if [ -n "${DRY_RUN:-}" ]; then "$@"; else "$@" & fi
}
tests() { # name, seconds, arguments of pytest
  local name="$1" limit="$2"
  shift 2
  beside part "$name" "$limit" env OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:cacheprovider -m gpu "${workers[@]}" "$@"
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
family=efcp_ldadamw,efcp_dct_adamw,efcp_trion,efcp_microadam
workers=()

checks() {
  local capability=90
  [ -n "${DRY_RUN:-}" ] || capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || capability=90
  ! "$python" -c 'import xdist' 2> /dev/null || workers=(-n 6 --dist worksteal)
  part machine 20 "$python" -c 'import torch; from hf_efcp.bench.measuring import machine; print(machine(torch.device("cuda")))'
  beside part compile 200 "$python" tests/kernels/compile_kernels.py "$capability"
  tests steps 300 tests/optim/test_cuda.py
  tests trainer 200 tests/integration/test_gpu_trainer.py
  tests graph_and_hook 200 tests/bench/test_measuring.py tests/engine/test_graph.py tests/distributed/test_factors_waits.py
  tests kernels 420 tests/kernels/test_on_gpu.py
  if [ -n "${DRY_RUN:-}" ] || command -v compute-sanitizer > /dev/null; then
    # Without torch's cache of memory, so that what lies beside a tensor belongs to nobody.
    beside part memcheck 240 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
      "$python" -m pytest -q -p no:cacheprovider -m gpu tests/kernels/test_on_gpu.py -k "float32 and 6 and 5-24-1024 or bfloat16 and int4 and mfac"
  else
    echo "-- memcheck: left out, compute-sanitizer is not installed" | tee -a "$out/$which/summary.txt"
  fi
  wait
}

figures() {
  local training=("$python" recipes/training_step.py --device cuda --precision bf16 --optim_args "" --steps 12)
  profile step_profile 50 --model bert-base --optim "$ours" # with a CUDA graph and without
  part training_step 55 "${training[@]}" --json "$out/$which/training_step.json"
  part training_step_no_graph 55 env HF_EFCP_CUDA_GRAPH=0 "${training[@]}" --json "$out/$which/training_step_no_graph.json"
  bench bert_base_family 50 bert-base --optim "$ours,$family" --device cuda --steps 6
  bench bert_base_m128 35 bert-base --optim "$ours" --optim_args window_size=128 --device cuda --steps 6
  bench bert_base_m1024 60 bert-base --optim "$ours" --optim_args window_size=1024 --device cuda --steps 6
  bench bert_base_dash 40 bert-base --optim efcp_dash --device cuda --steps 3
  bench bert_base_peers 70 bert-base --optim efcp_lowrank_mfac --device cuda --steps 4 --peers # among them is fused AdamW
  bench llama_1b_m128 45 llama-1b --dtype bfloat16 --optim "$ours" --optim_args window_size=128 --device cuda --steps 5
  for method in eigh newton; do
    part "dash_$method" 25 "$python" -m tests.dash_times --device cuda --block_size 128 --root_method "$method" --steps 4
  done
}

case "$which" in
  checks | figures) ;;
  *)
    echo "usage: bash recipes/gpu_benchmarks.sh checks|figures [FOLDER]" >&2
    exit 2
    ;;
esac
[ -n "${DRY_RUN:-}" ] || { mkdir -p "$out/$which" && rm -f "$out/$which"/{summary,ran,failed}.txt; } || exit 1
"$which"
[ -n "${DRY_RUN:-}" ] && exit
listed() { cat "$out/$which/$1.txt" 2> /dev/null | paste -sd ' ' | grep . || echo nothing; }
printf 'ran: %s\nfailed: %s\n' "$(listed ran)" "$(listed failed)" | tee -a "$out/$which/summary.txt"
tar -czf "$out/$which.tar.gz" -C "$out" "$which" && echo "results: $out/$which.tar.gz"
[ ! -e "$out/$which/failed.txt" ]

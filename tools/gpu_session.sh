#!/usr/bin/env bash
# Measure everything that needs a GPU in a quarter of an hour, without network: the most important first.
#
#     bash tools/gpu_session.sh [--budget SECONDS] [--rehearse] [OUTPUT] [PYTHON]
#
# It needs torch, Triton, numpy and safetensors; pytest, mamba_ssm, timm and ncu join if they are there. OUTPUT
# (default: work_dirs/gpu) gets a log of each step and the measurements as CSV, as they come, and OUTPUT.tar.gz has all of
# it, also after an interruption. PYTHON is python3 by default.
#
# A step that fails is named at the end, and the others go on. If the doctor fails, nothing is measured, because figures
# of wrong kernels are useless. A step is left out if less time is left than it needs, and it is stopped at its own limit
# or when the time is over (--budget, default 900 seconds).
#
# --rehearse runs the same steps on a CPU with tiny inputs, to find what is missing before the GPU is there. It has an
# hour, and steps have no limits of their own.
#
# Exit status: 0 all is well, 1 a step failed or was left out, 2 the arguments are wrong, 3 there is no torch or no GPU,
# 4 the doctor failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

budget=900 device=cuda
while [[ ${1:-} == --* ]]; do
    case $1 in
    --budget)
        [[ ${2:-} =~ ^[0-9]+$ ]] || { echo "--budget takes seconds, got '${2:-}'." >&2; exit 2; }
        budget=$2
        shift
        ;;
    --rehearse) device=cpu budget=3600 ;;
    *) echo "Unknown option $1. See the first lines of $0." >&2; exit 2 ;;
    esac
    shift
done
output=${1:-work_dirs/gpu} python=${2:-python3}
command -v "$python" >/dev/null || { echo "There is no $python: name a Python as the second argument." >&2; exit 2; }
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET  # its interpreter would take the place of the GPU
mkdir -p "$output" || exit 2
output=$(cd "$output" && pwd)
export MMLOCALMAMBA_CACHE=$output/tuning.json

# Seconds. A test has a clock of its own.
now() { ${GPU_SESSION_CLOCK:-date +%s}; }
start=$(now)
left() { echo $((budget - $(now) + start)); }

failed=() omitted=()
pack() { tar -czf "$output.tar.gz" -C "$(dirname "$output")" "$(basename "$output")"; }
trap pack EXIT
trap 'exit 143' TERM INT HUP

# step NAME LEAST MOST COMMAND...: run a command if at least LEAST seconds are left, for MOST seconds or what is left.
step() {
    local name=$1 least=$2 most=$3 time status
    shift 3
    time=$(left)
    if ((time < least)); then
        echo "=== $name is left out: it needs $least s, and $((time > 0 ? time : 0)) s are left"
        omitted+=("$name")
        return 1
    fi
    echo "=== $name ($time s are left): $*"
    [[ $device == cpu ]] || ((time < most)) || time=$most
    timeout --kill-after=10 "$time" "$@" 2>&1 | tee "$output/$name.log"
    status=$?
    if ((status == 124 || status == 137)); then
        echo "=== $name was stopped after its $time s" | tee -a "$output/$name.log"
    elif ((status)); then
        echo "=== $name failed with status $status"
    fi
    ((status)) && failed+=("$name")
    return $status
}

has() { "$python" -c "import $1" 2>/dev/null; }

if ! has torch; then
    echo "$python cannot import torch: name another Python as the second argument." >&2
    exit 3
fi
if [[ $device == cuda ]]; then
    if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
        echo 'torch sees no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES. --rehearse runs on a CPU.' >&2
        exit 3
    fi
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv >"$output/gpu.csv"
    cat "$output/gpu.csv"
    scans=(--device cuda --dtype bfloat16 --batch 64 --states 16 --shapes 'stage 1' 'stage 2' 'stage 3' 'stage 4'
        --methods triton chunked mamba_ssm authors --rounds 2 --seconds 0.1)
    tests=(tests/ops/test_triton.py tests/ops/test_triton_tuning.py)
    tune=("$python" -m mmlocalmamba tune --quick --dtypes bfloat16 --states 16)
    model=(--device cuda --dtype bfloat16 --sizes 224 --batch 128 --rounds 3 --seconds 0.3)
    profile=(--device cuda --dtype bfloat16 --batch 64 --states 16 --shapes 'stage 1' --methods 'triton, step')
else
    scans=(--quick --shapes 'stage 4' --states 2 --methods chunked)
    tests=(tests/ops/test_triton.py -k 'test_empty or test_segments')
    tune=("$python" -m pytest -q tests/ops/test_triton_tuning.py -k 'candidates or noise')
    model=(--sizes 32 --batch 2 --rounds 1 --seconds 0.01)
    profile=(--shapes 'stage 4' --states 2 --methods chunked)
fi

if ! step doctor 1 180 "$python" -m mmlocalmamba doctor; then
    echo "The doctor failed, so nothing was measured: $output/doctor.log" >&2
    exit 4
fi
step scans 30 240 "$python" tools/benchmark_scan.py "${scans[@]}" --csv "$output/scans.csv"
if has pytest; then
    workers=()
    if has xdist; then workers=(-n 8); fi
    step tests 60 240 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" "${tests[@]}"
else
    echo '=== tests are left out: pytest is not installed'
    omitted+=(tests)
fi
if step tune 60 240 "${tune[@]}"; then
    step scans-tuned 30 180 "$python" tools/benchmark_scan.py "${scans[@]}" --csv "$output/scans-tuned.csv"
fi
step model 60 180 "$python" tools/benchmark_model.py "${model[@]}" --training \
    --models LocalVMamba-T 'LocalVMamba-T, mamba_ssm' Swin-T ConvNeXt-T --results "$output/model.csv"
if command -v ncu >/dev/null; then
    step profile 60 180 ncu --kernel-name 'regex:scan_(forward|backward)' --launch-count 2 --set full --csv \
        --log-file "$output/profile.csv" "$python" tools/benchmark_scan.py "${profile[@]}" --once
else
    echo '=== profile is left out: ncu is not installed'
    omitted+=(profile)
fi

echo "Results after $(($(now) - start)) of $budget s: $output.tar.gz"
if ((${#failed[@]} + ${#omitted[@]})); then
    ((${#failed[@]})) && echo "Failed: ${failed[*]}"
    ((${#omitted[@]})) && echo "Left out: ${omitted[*]}"
    exit 1
fi

#!/usr/bin/env bash
# Run everything that needs a GPU, without network: tests, tuning of block sizes, benchmarks of scans and models.
#
#     bash tools/gpu_session.sh [OUTPUT] [PYTHON]
#
# The script writes to OUTPUT (default: work_dirs/gpu) a log of each part, the measurements as JSON, and tuning.json,
# the block sizes chosen for this GPU, which all later parts use. If a part fails, the script reports it and continues.
# It stops only if results are wrong, because measurements of wrong kernels are useless.
set -u
cd "$(dirname "$0")/.." || exit
output=${1:-work_dirs/gpu}
python=${2:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$output"
export MMLOCALMAMBA_CACHE=$output/tuning.json
failed=()

run() {
    local name=$1
    shift
    echo "=== $name: $*"
    if ! "$@" 2>&1 | tee "$output/$name.log"; then
        failed+=("$name")
        return 1
    fi
}
set -o pipefail

"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo 'There is no GPU.'; exit 1; }
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv | tee "$output/gpu.log"

run doctor "$python" -m mmlocalmamba doctor || exit 1
# These tests need only torch, so they run without the OpenMMLab stack too.
run tests "$python" -m pytest -q tests/ops/test_triton.py tests/ops/test_triton_tuning.py tests/ops/test_scan.py \
    tests/test_directions.py || exit 1
run tune "$python" -m mmlocalmamba tune

scan() {
    local name=$1
    shift
    run "scan-$name" "$python" tools/benchmark_scan.py --device cuda --json "$output/scan-$name.json" "$@"
}
for dtype in bfloat16 float32; do
    for batch in 1 64 128; do
        scan "$dtype-$batch" --dtype $dtype --batch $batch --shapes 'stage 1' 'stage 2' 'stage 3' 'stage 4'  \
            --seconds 0.2
    done
    scan "$dtype-detection" --dtype $dtype --batch 2 --shapes 512x512 800x1333
done

if "$python" -c 'import mmengine, mmcv' 2>/dev/null; then
    model() {
        local name=$1
        shift
        run "model-$name" "$python" tools/benchmark_model.py --device cuda --json "$output/model-$name.json" "$@"
    }
    model train --dtype bfloat16 --sizes 224 --batch 128
    model large --dtype bfloat16 --sizes 512 800 --batch 2
else
    echo 'mmengine and mmcv are not installed: whole models are skipped'
fi
if ((${#failed[@]})); then
    echo "Failed: ${failed[*]}"
    exit 1
fi
echo "Done: $output"

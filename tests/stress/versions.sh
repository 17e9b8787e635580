#!/usr/bin/env bash
# Try other versions of Python and torch, and print a row of docs/install.md for each.
#
#     tests/stress/versions.sh                                            # the core, in all rows
#     tests/stress/versions.sh "3.12 2.8.0 0.23.0" "3.11 2.14.1 0.29.1"   # Python, torch, torchvision
#
# The core: a wheel is built and installed with pip; both backbones train a step, are saved, loaded and searched, with
# the native kernel. TESTS=yes runs the tests of directions, operators and backbones, too. TRAIN=yes installs the
# OpenMMLab stack and trains, resumes and tests each task on tiny data. MMCV=compiled compiles mmcv for that
# (tools/install.sh), which takes 10 minutes a row.
#
# Each row has its own environment in $FOLDER, of 1 to 6 GB, which is removed before the next row. The output is in
# $FOLDER-*.log. Interpreters are pythonX.Y or those of pyenv. If a row's interpreter or packages are missing, the row
# says so and the script continues.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit

FOLDER=${FOLDER:-${TMPDIR:-/tmp}/mmlocalmamba-versions}
rows=("$@")
if [ ${#rows[@]} = 0 ]; then
    for torch in "2.6.0 0.21.0" "2.8.0 0.23.0" "2.11.0 0.26.0" "2.14.1 0.29.1"; do
        for python in 3.10 3.11 3.12 3.13 3.14; do rows+=("$python $torch"); done
    done
fi
WORKERS=${WORKERS:-$(env -u OMP_NUM_THREADS nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
# These tests need only torch, and run without the OpenMMLab packages.
alone="tests/test_directions.py tests/ops/test_scan.py tests/ops/test_cpu.py tests/ops/test_dispatch.py tests/ops/test_stand_ins.py
    tests/ops/test_causal_conv1d.py"
# These tests need MMEngine and mmcv. mmcv-lite is enough, because they use no operator of mmcv.
backbones="tests/test_table_cache.py tests/ops/test_library.py tests/layers/test_layers.py tests/backbones/test_backbones.py
    tests/backbones/test_contract.py tests/backbones/test_parity.py"

find_python() {
    if "python$1" -c '' 2>/dev/null; then  # pyenv has shims that do not start
        command -v "python$1"
    else
        find "${PYENV_ROOT:-$HOME/.pyenv}/versions" -path "*/versions/$1.*/bin/python" 2>/dev/null | sort -V | tail -n 1
    fi
}

# Run tests and print pytest's last line, without the time.
outcome() {
    # shellcheck disable=SC2086
    (cd "$1" && shift && "$FOLDER/venv/bin/python" -m pytest -q -p no:cacheprovider -n "$WORKERS" "$@" 2>&1) |
        tee -a "$log" | tail -n 1 | sed 's/ in .*//; s/, [0-9]* warnings*//'
}

# Print yes if the installed wheel works by itself, and by its native kernel.
core() {
    local folder=$FOLDER/core
    mkdir -p "$folder"
    (cd "$FOLDER/source/tests" && PYTHONPATH=helpers "$FOLDER/venv/bin/python" -c 'from test_models import USE; print(USE)') \
        >"$folder/use.py" 2>>"$log"
    echo 'from mmlocalmamba import ops; print("native kernel:", ops.available_backends(torch.zeros(1, 8, 16))["cpu"])' \
        >>"$folder/use.py"
    (cd "$folder" && "$FOLDER/venv/bin/python" -W ignore use.py "$folder") >"$folder/output" 2>&1
    cat "$folder/output" >>"$log"
    if ! grep -q '^native kernel' "$folder/output"; then
        echo "no: $(tail -n 1 "$folder/output" | cut -c 1-100)"
    elif grep -q '^native kernel: None' "$folder/output"; then
        echo yes
    else
        echo "without the native kernel: $(grep '^native kernel' "$folder/output" | cut -c 16-115)"
    fi
}

row() {
    local python=$1 torch=$2 torchvision=$3 log="$FOLDER-python-$1-torch-$2.log" interpreter core=- scans=- bones=- training=-
    interpreter=$(find_python "$python")
    if [ -z "$interpreter" ]; then
        echo "| $python | $torch, $torchvision | this Python is not installed | | | |"
        return
    fi
    rm -rf "$FOLDER"
    mkdir -p "$FOLDER"
    "$interpreter" -m venv "$FOLDER/venv" || return
    local pip="$FOLDER/venv/bin/python -m pip --disable-pip-version-check --quiet"
    local install="$pip install --no-compile"
    # uv unpacks CUDA's libraries once for all rows with the same torch.
    ! command -v uv >/dev/null || install="uv pip install --quiet --python $FOLDER/venv/bin/python"
    if ! $install "torch==$torch" "torchvision==$torchvision" "setuptools==80.9.0" wheel ninja numpy psutil pytest \
        pytest-xdist hypothesis >"$log" 2>&1; then
        local reason
        reason=$(tr -s '\n │' ' ' <"$log" | grep -oE '(ERROR|Because).*' | cut -c 1-120)
        echo "| $python | $torch, $torchvision | cannot be installed: $reason | | | |"
        return
    fi
    git archive HEAD | tar -x -C "$FOLDER" --one-top-level=source
    if ! { $pip wheel --no-deps --no-build-isolation --wheel-dir "$FOLDER/dist" "$FOLDER/source" &&
        $pip install "$FOLDER"/dist/*.whl; } >>"$log" 2>&1; then
        echo "| $python | $torch, $torchvision | this package is not built | | | |"
        return
    fi
    # Remove the sources, so that the tests import the installed package.
    rm -rf "$FOLDER/source/mmlocalmamba"
    core=$(core)
    if [ "${TESTS:-no}" = yes ]; then
        # shellcheck disable=SC2086
        scans=$(outcome "$FOLDER/source" $alone)
        # shellcheck disable=SC2086
        if $pip install mmengine==0.10.7 mmcv-lite==2.1.0 >>"$log" 2>&1; then
            bones=$(outcome "$FOLDER/source" $backbones)
        else
            bones="MMEngine cannot be installed"
        fi
    fi
    if [ "${TRAIN:-no}" = yes ]; then
        git archive HEAD mmlocalmamba | tar -x -C "$FOLDER/source"
        if (cd "$FOLDER/source" && export PATH="$FOLDER/venv/bin:$PATH" &&
            PYTHON="$FOLDER/venv/bin/python" bash tools/install.sh --no-venv && python tests/systems/smoke.py) >>"$log" 2>&1; then
            training=yes
        else
            training="no: $(grep -E '[A-Z][A-Za-z]*Error|^fail |^error' "$log" | tail -n 1 | cut -c 1-100)"
        fi
    fi
    echo "| $python | $torch, $torchvision | $core | $scans | $bones | $training |"
}

echo "| Python | torch, torchvision | the core | scans, ops | backbones | a training of each task |"
echo "|---|---|---|---|---|---|"
for wanted in "${rows[@]}"; do
    # shellcheck disable=SC2086
    row $wanted
done
rm -rf "$FOLDER/venv"

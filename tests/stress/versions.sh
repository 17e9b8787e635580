#!/usr/bin/env bash
# Run the tests of directions, operators and backbones with other versions of Python and torch, and with TRAIN=yes a
# training of each task, too. The script prints a row of docs/install.md for each.
#
#     tests/stress/versions.sh                                            # all rows
#     tests/stress/versions.sh "3.12 2.8.0 0.23.0" "3.11 2.14.1 0.29.1"   # Python, torch, torchvision
#
# Each row has its own environment in $FOLDER, of 1 to 6 GB, which is removed before the next row. The output is in
# $FOLDER-*.log. Interpreters are pythonX.Y or those of pyenv. If a row's interpreter or packages are missing, the row
# says so and the script continues. TRAIN=only does the trainings and nothing else. MMCV=compiled compiles mmcv for them
# (tools/install.sh), which takes 10 minutes a row.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit

FOLDER=${FOLDER:-${TMPDIR:-/tmp}/mmlocalmamba-versions}
rows=("$@")
if [ ${#rows[@]} = 0 ]; then
    for torch in "2.6.0 0.21.0" "2.8.0 0.23.0" "2.11.0 0.26.0" "2.14.1 0.29.1"; do
        for python in 3.10 3.11 3.12 3.13; do rows+=("$python $torch"); done
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

row() {
    local python=$1 torch=$2 torchvision=$3 log="$FOLDER-python-$1-torch-$2.log" interpreter scans=- bones=- training=-
    interpreter=$(find_python "$python")
    if [ -z "$interpreter" ]; then
        echo "| $python | $torch, $torchvision | this Python is not installed | | |"
        return
    fi
    rm -rf "$FOLDER"
    mkdir -p "$FOLDER"
    "$interpreter" -m venv "$FOLDER/venv" || return
    local pip="$FOLDER/venv/bin/python -m pip --disable-pip-version-check --quiet install"
    if ! $pip "torch==$torch" "torchvision==$torchvision" "setuptools==80.9.0" wheel ninja pytest pytest-xdist hypothesis numpy \
        >"$log" 2>&1; then
        echo "| $python | $torch, $torchvision | cannot be installed: $(grep -m 1 ERROR "$log" | cut -c 1-100) | | |"
        return
    fi
    git archive HEAD | tar -x -C "$FOLDER" --one-top-level=source
    if ! $pip --no-deps --no-build-isolation "$FOLDER/source" >>"$log" 2>&1; then
        echo "| $python | $torch, $torchvision | this package is not built | | |"
        return
    fi
    # Remove the sources, so that the tests import the installed package.
    rm -rf "$FOLDER/source/mmlocalmamba"
    # shellcheck disable=SC2086
    [ "${TRAIN:-no}" = only ] || scans=$(outcome "$FOLDER/source" $alone)
    if [ "${TRAIN:-no}" != only ] && $pip mmengine==0.10.7 mmcv-lite==2.1.0 >>"$log" 2>&1; then
        # shellcheck disable=SC2086
        bones=$(outcome "$FOLDER/source" $backbones)
    fi
    if [ "${TRAIN:-no}" != no ]; then
        "$FOLDER/venv/bin/python" -m pip uninstall --yes --quiet mmcv-lite >>"$log" 2>&1
        git archive HEAD mmlocalmamba | tar -x -C "$FOLDER/source"
        if (cd "$FOLDER/source" && export PATH="$FOLDER/venv/bin:$PATH" &&
            PYTHON="$FOLDER/venv/bin/python" bash tools/install.sh --no-venv && python tests/systems/smoke.py) >>"$log" 2>&1; then
            training=yes
        else
            training="no: $(grep -E '[A-Z][A-Za-z]*Error|^fail ' "$log" | tail -n 1 | cut -c 1-100)"
        fi
    fi
    echo "| $python | $torch, $torchvision | $scans | $bones | $training |"
}

echo "| Python | torch, torchvision | scans, ops | backbones | a training of each task |"
echo "|---|---|---|---|---|"
for wanted in "${rows[@]}"; do
    # shellcheck disable=SC2086
    row $wanted
done
rm -rf "$FOLDER/venv"

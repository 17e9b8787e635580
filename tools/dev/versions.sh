#!/usr/bin/env bash
# The tests of scans, ops and backbones with other versions of Python and torch; where mmcv can be had, a training of
# each task, too. Prints a row of docs/install.md for each.
#
#     tools/dev/versions.sh                                  # all rows
#     tools/dev/versions.sh "3.12 2.8.0 0.23.0" "3.11 2.14.1 0.29.1"   # Python, torch, torchvision
#
# Each row has an environment of its own, in $FOLDER, which is removed before the next: 1 to 6 GB. What was said is in
# $FOLDER-*.log. Interpreters are pythonX.Y, or those of pyenv; a row without interpreter, or whose packages cannot be had,
# says so and is no failure of the others. MMCV=yes compiles mmcv where there is no ready wheel of it: 10 minutes a row.
# MMCV=only: nothing but that and the trainings.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit

FOLDER=${FOLDER:-${TMPDIR:-/tmp}/mmlocalmamba-versions}
rows=("$@")
if [ ${#rows[@]} = 0 ]; then
    for torch in "2.6.0 0.21.0" "2.8.0 0.23.0" "2.11.0 0.26.0" "2.14.1 0.29.1"; do
        for python in 3.10 3.11 3.12 3.13; do rows+=("$python $torch"); done
    done
fi
WORKERS=${WORKERS:-$(nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
# Without the OpenMMLab packages: scans and ops, which need torch alone.
alone="tests/test_scans.py tests/test_ops.py tests/test_ops_cpu.py tests/test_ops_dispatch.py tests/test_mamba.py
    tests/test_causal_conv.py"
# With MMEngine and mmcv (mmcv-lite will do: no op of mmcv's is needed).
backbones="tests/test_sizes.py tests/test_ops_library.py tests/test_layers.py tests/test_backbones.py
    tests/test_contract.py tests/test_parity.py"

find_python() {
    if "python$1" -c '' 2>/dev/null; then  # pyenv has stand-ins that do not start
        command -v "python$1"
    else
        find "${PYENV_ROOT:-$HOME/.pyenv}/versions" -path "*/versions/$1.*/bin/python" 2>/dev/null | sort -V | tail -n 1
    fi
}

# What pytest says at its end, without colours.
outcome() {
    # shellcheck disable=SC2086
    (cd "$1" && shift && "$FOLDER/venv/bin/python" -m pytest -q -p no:cacheprovider -n "$WORKERS" "$@" 2>&1) |
        tee -a "$log" | tail -n 1 | sed 's/ in .*//; s/, [0-9]* warnings*//'
}

row() {
    local python=$1 torch=$2 torchvision=$3 log="$FOLDER-python-$1-torch-$2.log" interpreter scans=- bones=- training=-
    interpreter=$(find_python "$python")
    if [ -z "$interpreter" ]; then
        echo "| $python | $torch, $torchvision | no such Python here | | |"
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
    # The installed package, not the sources.
    rm -rf "$FOLDER/source/mmlocalmamba"
    # shellcheck disable=SC2086
    [ "${MMCV:-no}" = only ] || scans=$(outcome "$FOLDER/source" $alone)
    if [ "${MMCV:-no}" != only ] && $pip mmengine==0.10.7 mmcv-lite==2.1.0 >>"$log" 2>&1; then
        # shellcheck disable=SC2086
        bones=$(outcome "$FOLDER/source" $backbones)
    fi
    if [ "${MMCV:-no}" != no ]; then
        "$FOLDER/venv/bin/python" -m pip uninstall --yes --quiet mmcv-lite >>"$log" 2>&1
        git archive HEAD mmlocalmamba | tar -x -C "$FOLDER/source"
        if (cd "$FOLDER/source" && export PATH="$FOLDER/venv/bin:$PATH" &&
            PYTHON="$FOLDER/venv/bin/python" bash tools/install.sh --no-venv && python tools/smoke.py) >>"$log" 2>&1; then
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

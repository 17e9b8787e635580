#!/usr/bin/env bash
# Compile the Triton kernels for GPUs that are not here with other versions of Triton, in the environment at hand.
#
#     tests/stress/triton_versions.sh [VERSION...]
#
# Each version comes from pip into a folder of its own, which is removed. Exit status: 1 if a version of 3.3 or later
# does not compile them. 3.2 is known not to, and the dispatcher does not choose the kernels there.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit

versions=("$@")
[ ${#versions[@]} != 0 ] || versions=(3.2.0 3.3.1 3.4.0 3.5.1 3.6.0)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset TRITON_INTERPRET
export TRITON_CACHE_DIR=$folder/cache
failed=0
for version in "${versions[@]}"; do
    rm -rf "$folder/triton" "$folder/cache"
    if ! python -m pip --quiet --disable-pip-version-check install --no-deps --target "$folder/triton" "triton==$version"; then
        echo "triton $version: cannot be installed"
        continue
    fi
    for target in ${TARGETS:-sm_80 sm_90}; do
        if PYTHONPATH=$folder/triton:$PWD python tools/benchmark_scan.py --compile "$target" --dtype bfloat16 --batch 64 \
            --states 16 1 --shapes 'stage 1' 'stage 3' LocalVim-T 800x1333 >"$folder/log" 2>&1; then
            echo "triton $version, $target: compiles"
            [ -z "${VERBOSE:-}" ] || cat "$folder/log"
        else
            echo "triton $version, $target: $(tail -n 1 "$folder/log" | cut -c 1-150)"
            [[ $version == 3.[012].* ]] || failed=1
        fi
    done
done
exit $failed

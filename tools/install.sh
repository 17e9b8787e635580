#!/usr/bin/env bash
# Install one of the two stacks and this package. It can be run again at any time and skips finished steps. pip's own
# settings (PIP_FIND_LINKS, PIP_INDEX_URL, ...) apply.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: tools/install.sh [--no-venv] [--reinstall-torch] [--no-dev] [--until=STEP]

  --no-venv          install into the current environment (a GPU machine that has
                     torch, a container) and keep its torch if that is >= 2.6
  --reinstall-torch  with --no-venv, install the pinned torch anyway
  --no-dev           leave out the tools: tests, exporters, runtimes (the demo needs none)
  --until=STEP       stop after this step: venv, torch, build, mmcv, stack, verify
                     (the layers of a container image)

Environment:
  STACK       openmmlab (default; into .venv) or onedl (into .venv-onedl)
  MMCV        torchvision: mmcv without its compiled ops, torchvision stands in for
              NMS, RoIAlign and deformable convolutions, the other ops refuse.
              compiled: mmcv with all its ops; takes 7 to 15 minutes.
              Default: compiled where there are a GPU and nvcc, because training on
              a GPU uses more of mmcv's ops; elsewhere what is installed already,
              else torchvision
  VENV_DIR    another folder for the virtual environment
  PYTHON      the interpreter (default: python3.11 or python3, if it is >= 3.10)
  FORCE_CUDA  1 requires mmcv's CUDA ops even where there is no GPU;
              TORCH_CUDA_ARCH_LIST names the GPU architectures
TEXT
}

say() { printf '%s\n' "$*"; }
fail() {
    printf '\nerror: %s\n' "$1" >&2
    shift
    [ $# = 0 ] || printf '  %s\n' "$@" >&2
    exit 1
}

use_venv=yes reinstall_torch=no dev=yes until=package
for option in "$@"; do
    case $option in
        --no-venv) use_venv=no ;;
        --reinstall-torch) reinstall_torch=yes ;;
        --no-dev) dev=no ;;
        --until=venv | --until=torch | --until=build | --until=mmcv | --until=stack | --until=verify)
            until=${option#*=} ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; fail "unknown option $option" ;;
    esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
STACK=${STACK:-openmmlab}
case $STACK in
    openmmlab) venv=${VENV_DIR:-$root/.venv} ;;
    onedl) venv=${VENV_DIR:-$root/.venv-onedl} ;;
    *) fail "STACK=$STACK is unknown" "It is openmmlab or onedl." ;;
esac
wanted=requirements/$STACK.txt
constraints=requirements/constraints-$STACK.txt
mmcv=$(grep -E '^[a-z-]*mmcv' "requirements/mmcv-$STACK.txt")
stand_in=requirements/mmcv_torchvision

has_gpu_and_nvcc() {
    { command -v nvcc || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; } >/dev/null &&
        command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

# `chosen` is the kind that is installed, `accepted` are the kinds that need no change.
case ${MMCV:-} in
    torchvision | compiled) chosen=$MMCV accepted=$MMCV ;;
    '') if [ "${FORCE_CUDA:-}" = 1 ] || has_gpu_and_nvcc; then
            chosen=compiled accepted=compiled
        else
            chosen=torchvision accepted='torchvision compiled'
        fi ;;
    *) fail "MMCV=$MMCV is unknown" "It is torchvision or compiled." ;;
esac
[ "$chosen" != torchvision ] || [ "${FORCE_CUDA:-}" != 1 ] ||
    fail "FORCE_CUDA=1 asks for mmcv's CUDA ops, and MMCV=torchvision has none" "Leave one of the two out."
log=$(mktemp "${TMPDIR:-/tmp}/mmlocalmamba-install.XXXXXX")
work=  # a folder for what is built
progress=  # a process that tells how far the compiler is
building=  # the process that builds this package
built=  # its log
clean_up() {
    local status=$?
    [ -z "$progress" ] || kill "$progress" 2>/dev/null || true
    [ -z "$building" ] || { pkill -P "$building" 2>/dev/null; kill "$building" 2>/dev/null; } || true
    [ -z "$work" ] || rm -rf "$work"
    [ -z "$built" ] || rm -rf "$built"
    [ $status != 0 ] && [ -s "$log" ] || rm -f "$log"
}
trap clean_up EXIT

# ---- the interpreter -------------------------------------------------------

good_python() {
    command -v "$1" >/dev/null &&
        "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    good_python "$PYTHON" ||
        fail "PYTHON=$PYTHON is not a Python >= 3.10" "Name another one: PYTHON=/path/to/python3.11 make ..."
else
    for PYTHON in python3.11 python3 ''; do
        if [ -n "$PYTHON" ] && good_python "$PYTHON"; then break; fi
    done
    [ -n "$PYTHON" ] ||
        fail "found no python3.11, and no python3 that is >= 3.10" \
            "Install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv)," \
            "or name it: PYTHON=/path/to/python3.11 make ..."
fi
python=$PYTHON

pip_install() {
    # Conflicts are not reported, because the only one is openmim's requirement of opendatalab
    # (requirements/mim-openmmlab.txt). In a virtual environment, compile_bytecode compiles it all at once.
    local more=()
    [ $use_venv = no ] || more=(--no-compile)
    "$python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts "${more[@]}" "$@"
}

# ---- steps -----------------------------------------------------------------

# In a virtual environment each finished step leaves a stamp with a hash of its inputs. Elsewhere pip checks again,
# which is quick when everything is installed.
digest() { "$python" -c '
import hashlib, sys
h = hashlib.sha256(repr(sys.version_info[:3]).encode())
for name in sys.argv[1:]:
    h.update(open(name, "rb").read())
print(h.hexdigest())' "$@"; }

# done_before NAME KEY
done_before() {
    local stamp=$venv/.stamps/$1
    [ $use_venv = yes ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$2" ]
}

# step NAME KEY "TEXT" "TIME" COMMAND...
step() {
    local name=$1 key=$2 text=$3 time=$4
    shift 4
    local stamp=$venv/.stamps/$name
    if done_before "$name" "$key"; then
        say "[$name] $text: already done"
    else
        say "[$name] $text ($time)"
        local start=$SECONDS
        rm -f "$stamp"  # a step that fails may have undone what was there
        "$@"
        say "[$name] done in $((SECONDS - start)) s"
        if [ $use_venv = yes ]; then
            mkdir -p "$venv/.stamps"
            printf '%s' "$key" >"$stamp"
        fi
    fi
    if [ "$name" = "$until" ]; then
        say "Ready: $("$python" -c 'import sys; print(sys.prefix)')"
        exit
    fi
}

# quietly "WHAT TO DO" COMMAND... shows the output only if the command fails.
quietly() {
    local advice=$1
    shift
    "$@" >"$log" 2>&1 || {
        tail -n 40 "$log" >&2
        local reason
        reason=$(missing)
        fail "${reason:-this step failed} (output: $log)" "$advice" \
            "Then run the same command again; it skips finished steps."
    }
}

# Say in a line what the output of a failed command complains about.
missing() {
    local file
    if grep -qiE 'no space left on device|disk quota exceeded' "$log"; then
        say "the disk is full: $(df -Ph "${venv%/*}" "${TMPDIR:-/tmp}" | awk 'NR > 1 {print $4 " left on " $6}' |
            sort -u | paste -sd, | sed 's/,/, /g')"
    elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|Network is unreachable|ProxyError|SSLError' "$log"
    then
        say "the package index cannot be reached"
    elif file=$(grep -oE 'No matching distribution found for [^ ]+' "$log"); then
        say "the package index has no file of ${file##* } for $("$python" -V 2>&1) on this machine"
    fi
}

network='Check the network, or set PIP_INDEX_URL or PIP_FIND_LINKS to a place that has the packages.'

make_venv() {
    # Empty the folder only if this script made it: then the Python or the path has changed.
    local clear=()
    [ ! -d "$venv/.stamps" ] || clear=(--clear)
    quietly "Does '$python -m venv' work? Debian and Ubuntu: apt-get install python3-venv" \
        "$python" -m venv "${clear[@]}" "$venv"
}

install_torch() {
    if [ $use_venv = no ] && [ $reinstall_torch = no ] && keep_torch; then return; fi
    quietly "$network" pip_install -r requirements/torch.txt
}

# Keep an installed torch that is new enough, and install a torchvision if none works.
keep_torch() {
    local version
    version=$("$python" - 2>/dev/null <<'PY'
from importlib.metadata import version

import torch
major, minor = (int(part) for part in torch.__version__.split('.')[:2])
assert (major, minor) >= (2, 6)
print(version('torch'))  # as pip knows it; torch.__version__ may add its CUDA version
PY
    ) || return 1
    say "        keeping torch $version"
    "$python" -c 'import torchvision' 2>/dev/null ||
        quietly "If no torchvision fits torch $version, install one yourself or use --reinstall-torch." \
            pip_install "torch==$version" torchvision
}

# mmcv_works KIND...: Succeed if the right version of mmcv is installed, if it is of one of these kinds, and if NMS and
# RoIAlign run, on the GPU too if there is one. There is none while an image is built. Print what is installed.
mmcv_works() {
    "$python" - "${mmcv#*==}" "$stand_in/mmcv/_ext.py" "$@" 2>"$log" <<'PY'
import os
import sys
from pathlib import Path

import mmcv
import torch
from mmcv import _ext
from mmcv.ops import RoIAlign, get_compiling_cuda_version, nms

version, stand_in, *kinds = sys.argv[1:]
compiled = not _ext.__file__.endswith('.py')
assert mmcv.__version__ == version, f'mmcv {mmcv.__version__} is installed, not {version}'
assert ('compiled' if compiled else 'torchvision') in kinds, f'{_ext.__file__} is not of the kind {kinds[0]}'
assert compiled or Path(_ext.__file__).read_bytes() == Path(stand_in).read_bytes(), f'{_ext.__file__} is outdated'
if os.environ.get('FORCE_CUDA') == '1':
    assert get_compiling_cuda_version() != 'not available', 'mmcv has no CUDA ops'
for device in ['cpu'] + ['cuda'] * torch.cuda.is_available():
    boxes = torch.tensor([[0., 0., 9., 9.], [0., 0., 9., 8.]], device=device)
    kept, _ = nms(boxes, torch.tensor([0.9, 0.8], device=device), 0.5)
    assert len(kept) == 1, kept
    rois = torch.cat([boxes.new_zeros(2, 1), boxes], 1)
    assert (RoIAlign(2)(torch.ones(1, 1, 12, 12, device=device), rois) == 1).all()
print(f'mmcv {version} with its compiled ops' if compiled else
      f'mmcv {version} without compiled ops. torchvision stands in for: {", ".join(_ext.STANDS_IN)}.\n'
      '        Other ops of mmcv refuse when they are called; MMCV=compiled installs them.')
PY
}

remove_mmcv() {
    # All kinds own the same folder, so one must go before another comes.
    "$python" -m pip uninstall --yes --quiet mmcv mmcv-lite onedl-mmcv mmlocalmamba-mmcv-torchvision >/dev/null 2>&1 ||
        true
}

install_mmcv() {
    local found
    # shellcheck disable=SC2086
    if found=$(mmcv_works $accepted); then
        say "        keeps $found"
        return
    fi
    remove_mmcv
    work=$(mktemp -d "${TMPDIR:-/tmp}/mmlocalmamba-mmcv.XXXXXX")
    if [ "$chosen" = compiled ]; then install_compiled_mmcv; else install_mmcv_without_ops; fi
    rm -rf "$work"
    mmcv_works "$chosen" >/dev/null || {
        tail -n 20 "$log" >&2
        fail "mmcv is installed, but NMS and RoIAlign do not run" \
            "Check that torch works: $python -c 'import torch, torchvision; print(torch.__version__)'" \
            "With a GPU and MMCV=compiled, nvcc must have the same CUDA major version as torch."
    }
}

install_mmcv_without_ops() {
    case $STACK in
        openmmlab) quietly "$network" pip_install --constraint "$constraints" "mmcv-lite==${mmcv#*==}" ;;
        # It has no lite package. pip's isolated build has no torch, and then this package leaves its ops out. No cache,
        # because a cached wheel may have ops.
        onedl)
            quietly "$network" pip_install --no-deps --no-binary "${mmcv%%==*}" --no-cache-dir "$mmcv"
            quietly "$network" pip_install --constraint "$constraints" "$mmcv" ;;
    esac
    cp -R "$stand_in" "$work/stand-in"  # setuptools leaves files beside the sources
    quietly "The error above comes from $stand_in." \
        pip_install --no-deps --no-build-isolation --no-cache-dir "$work/stand-in"
}

install_compiled_mmcv() {
    local name=${mmcv%%==*}
    # Take a ready wheel if pip finds one. It may have been built for another torch.
    if pip_install --only-binary "$name" --constraint "$constraints" "$mmcv" >"$log" 2>&1; then
        if mmcv_works compiled >/dev/null; then
            say "        uses a ready wheel"
            return
        fi
        say "        the ready wheel does not work with this torch"
    fi
    local compiler
    read -r compiler _ <<<"${CXX:-g++}"
    command -v "$compiler" >/dev/null ||
        fail "there is no C++ compiler ($compiler), which MMCV=compiled needs" \
            "Debian, Ubuntu: apt-get install g++. Or take MMCV=torchvision, which compiles nothing."
    # nproc obeys OMP_NUM_THREADS, which says nothing about the number of compilers.
    local jobs=${MAX_JOBS:-$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)}
    say "        compiles mmcv and its ops with $jobs processes: 7 to 15 minutes on 2 cores, longer for a GPU"
    tell_progress &
    progress=$!
    # No cache, because a cached wheel may have been built for another torch.
    TMPDIR=$work CFLAGS="${CFLAGS:--g0 -O2}" MMCV_WITH_OPS=1 MAX_JOBS=$jobs quietly \
        "mmcv needs gcc and g++, and for a GPU an nvcc of torch's CUDA version. If memory runs out, set MAX_JOBS=1." \
        pip_install --no-build-isolation --no-binary "$name" --no-cache-dir --force-reinstall --no-deps "$mmcv"
    kill "$progress" 2>/dev/null || true
    progress=
    quietly "$network" pip_install --constraint "$constraints" "$mmcv"
}

# Count the object files of the build every half minute. torch writes build.ninja, which names them all.
tell_progress() {
    local start=$SECONDS all
    while sleep 30 >/dev/null 2>&1; do
        all=$(find "$work" -name build.ninja -exec grep -hc '^build .*\.o:' {} + 2>/dev/null | tail -n 1)
        say "        compiles mmcv: $(find "$work" -name '*.o' 2>/dev/null | wc -l) of ${all:-?} files," \
            "$((SECONDS - start)) s"
    done
}

install_stack() {
    # There is no build isolation, because each source package would otherwise fetch its own build tools.
    quietly "$network" pip_install --no-build-isolation --constraint "$constraints" -r "$wanted"
    quietly "$network" pip_install --no-deps -r "requirements/mim-$STACK.txt"
    [ $dev = yes ] || compile_bytecode
}

install_tools() {
    local lists=(-r requirements/dev.txt)
    [ "$STACK" != onedl ] || lists+=(-r requirements/rotated-onedl.txt)
    quietly "$network" pip_install --no-build-isolation --constraint "$constraints" -r "$wanted" "${lists[@]}"
    compile_bytecode
}

compile_bytecode() {
    # Compile 20,000 files on all cores; pip compiles them one after another. Without bytecode, every process that must
    # not write it (PYTHONDONTWRITEBYTECODE) compiles again, and `import mmdet.models` takes 16 s instead of 7. A few
    # files of packages are templates and not valid Python, so a failure is ignored.
    [ $use_venv = no ] || "$python" -m compileall -qq -j 0 "$venv"/lib/python*/site-packages || true
}

verify() {
    local found
    # shellcheck disable=SC2086
    found=$(mmcv_works $accepted) || {
        tail -n 20 "$log" >&2
        fail "NMS and RoIAlign of mmcv do not run" \
            "mmcv was built for another torch, or another package replaced it." \
            "Remove its stamp (rm -f $venv/.stamps/mmcv) and run this again."
    }
    say "        $found"
    quietly "The error above names the package that fails to load." \
        "$python" -c 'import mmpretrain, mmdet, mmseg, mim'
}

# Install this package beside the other steps: the compiler works while pip downloads.
start_building() {
    built=$(mktemp "${TMPDIR:-/tmp}/mmlocalmamba-package.XXXXXX")
    pip_install --no-deps --no-build-isolation --editable . >"$built" 2>&1 &
    building=$!
}

finish_building() {
    local status=0
    wait "$building" || status=$?
    building=
    cat "$built"
    return $status
}

install_package() {
    quietly "The error above comes from this project's setup.py." finish_building
    local problem
    problem=$("$python" -c 'from mmlocalmamba.openmmlab import multimodal; print(multimodal.problem() or "")' \
        2>/dev/null | tail -n 1) || true
    [ -z "$problem" ] || say "        note: $problem."
}

# ---- go --------------------------------------------------------------------

if [ $use_venv = yes ]; then
    say "Installing the $STACK stack into ${venv##*/}: 2 to 5 minutes in total"
    # The path is part of the key, because the scripts of a moved environment do not start.
    venv_key="$(digest) $venv"
    step venv "$venv_key" "virtual environment ${venv##*/} ($("$python" -V))" "5 s" make_venv
    python=$venv/bin/python
else
    say "Installing the $STACK stack into the environment of $(command -v "$python")"
fi

case $chosen in
    torchvision) about="$mmcv without compiled ops; torchvision stands in for them" time="10 to 30 s" ;;
    compiled) about="$mmcv with its compiled ops" time="10 s from a wheel, 7 to 15 minutes when compiled on 2 cores" ;;
esac
stack_files=(requirements/common.txt requirements/*"$STACK".txt)
tool_files=("${stack_files[@]}" requirements/dev.txt requirements/deploy.txt)
mmcv_key="$mmcv ${MMCV:-$chosen or what is there} $(digest requirements/torch.txt "$stand_in/mmcv/_ext.py")"
step torch "$(digest requirements/torch.txt)" \
    "torch and torchvision" "60 to 100 s, several GB with CUDA" install_torch
step build "$(digest requirements/build.txt)" \
    "build tools: setuptools, wheel, ninja, psutil" "5 s" \
    quietly "$network" pip_install -r requirements/build.txt
# The build of this package depends on its metadata, its native sources and torch.
mapfile -t sources < <(find mmlocalmamba -name '*.cpp' -o -name '*.h' 2>/dev/null | sort)
# `make clean` may have removed the links that an editable install puts into the source tree.
[ -e mmlocalmamba/.mim/configs ] || rm -f "$venv/.stamps/package"
package_sources=(setup.py pyproject.toml requirements/torch.txt mmlocalmamba/__init__.py "${sources[@]}")
if [ "$until" = package ]; then  # the layers of an image have no sources before
    package_key="$root $(digest "${package_sources[@]}")"
    done_before package "$package_key" || start_building
fi
step mmcv "$mmcv_key" "$about" "$time" install_mmcv
step stack "$(digest "${stack_files[@]}")" \
    "MMEngine, mmpretrain, mmdet, mmsegmentation, mim" "1 to 2 minutes" install_stack
[ $dev = no ] || step tools "$(digest "${tool_files[@]}")" \
    "test tools, exporters and runtimes" "1 minute" install_tools
step verify "$mmcv_key $(digest "${stack_files[@]}")" "check: NMS and RoIAlign of mmcv run; the packages load" "10 s" verify
step package "$package_key" \
    "mmlocalmamba itself, editable; its CPU kernel is compiled since the step mmcv" "5 to 60 s" install_package

#!/usr/bin/env bash
# Installs one of the two stacks and this package. Run it again at any time: what
# is done is skipped. pip's own settings (PIP_FIND_LINKS, PIP_INDEX_URL, ...) hold.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: tools/install.sh [--no-venv] [--reinstall-torch] [--no-dev] [--until=STEP]

  --no-venv          install into the current environment (a GPU machine that has
                     torch, a container) and keep its torch if that is >= 2.6
  --reinstall-torch  with --no-venv: take the pinned torch all the same
  --no-dev           leave out the test tools
  --until=STEP       end after this step: venv, torch, build, mmcv, stack, verify
                     (the layers of a container image)

Environment:
  STACK       openmmlab (default; into .venv) or onedl (into .venv-onedl)
  VENV_DIR    another folder for the virtual environment
  PYTHON      the interpreter (default: python3.11 or python3, if it is >= 3.10)
  FORCE_CUDA  1: mmcv must have its CUDA ops also where there is no GPU;
              TORCH_CUDA_ARCH_LIST says for which GPUs
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
mmcv=$(grep -E '^(onedl-)?mmcv==' "$wanted")
log=$(mktemp "${TMPDIR:-/tmp}/mmlocalmamba-install.XXXXXX")
trap '[ -s "$log" ] || rm -f "$log"' EXIT

# ---- the interpreter -------------------------------------------------------

good_python() {
    command -v "$1" >/dev/null &&
        "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    good_python "$PYTHON" ||
        fail "PYTHON=$PYTHON is not a Python >= 3.10" "Name another: PYTHON=/path/to/python3.11 make ..."
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
    # Conflicts are not reported: the only one is openmim's wish for opendatalab
    # (requirements/mim-openmmlab.txt).
    # Where there are many packages to come, all their bytecode is made at once (install_rest).
    local more=()
    [ $use_venv = no ] || more=(--no-compile)
    "$python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts "${more[@]}" "$@"
}

# ---- steps -----------------------------------------------------------------

# In a virtual environment each finished step leaves a stamp with a hash of what
# it depends on. Elsewhere pip is asked again, which is quick when all is there.
digest() { "$python" -c '
import hashlib, sys
h = hashlib.sha256(repr(sys.version_info[:3]).encode())
for name in sys.argv[1:]:
    h.update(open(name, "rb").read())
print(h.hexdigest())' "$@"; }

# step NAME KEY "TEXT" "TIME" COMMAND...
step() {
    local name=$1 key=$2 text=$3 time=$4
    shift 4
    local stamp=$venv/.stamps/$name
    if [ $use_venv = yes ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
        say "[$name] $text: done before"
    else
        say "[$name] $text ($time)"
        local start=$SECONDS
        "$@"
        say "[$name] done in $((SECONDS - start)) s"
        if [ $use_venv = yes ]; then
            mkdir -p "$venv/.stamps"
            printf '%s' "$key" >"$stamp"
        fi
    fi
    if [ "$name" = "$until" ]; then
        rm -f "$log"
        say "Ready: $("$python" -c 'import sys; print(sys.prefix)')"
        exit
    fi
}

# quietly "WHAT TO DO" COMMAND...: shows the output only if the command fails.
quietly() {
    local advice=$1
    shift
    "$@" >"$log" 2>&1 || {
        tail -n 40 "$log" >&2
        fail "this step failed (the whole output: $log)" "$advice" "Then run the same command again; finished steps are skipped."
    }
}

network='Check the network, or point PIP_INDEX_URL or PIP_FIND_LINKS at a place that has the packages.'

make_venv() {
    # Emptied only if it is known to be ours: then the Python or the path changed.
    local clear=()
    [ ! -d "$venv/.stamps" ] || clear=(--clear)
    quietly "Does '$python -m venv' work? Debian and Ubuntu: apt-get install python3-venv" \
        "$python" -m venv "${clear[@]}" "$venv"
}

install_torch() {
    if [ $use_venv = no ] && [ $reinstall_torch = no ] && keep_torch; then return; fi
    quietly "$network" pip_install -r requirements/torch.txt
}

# Keeps the torch that is there, if it is new enough, and sees to torchvision.
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
    say "        keeps torch $version"
    "$python" -c 'import torchvision' 2>/dev/null ||
        quietly "No torchvision fits torch $version? Install one, or use --reinstall-torch." \
            pip_install "torch==$version" torchvision
}

# True if mmcv is the wanted one and its ops run, on the GPU too if there is one.
# Where an image is built there is none.
mmcv_works() {
    "$python" - "${mmcv#*==}" >"$log" 2>&1 <<'PY'
import os
import sys

import mmcv
import torch
from mmcv.ops import get_compiling_cuda_version, nms

assert mmcv.__version__ == sys.argv[1], f'mmcv {mmcv.__version__}'
if os.environ.get('FORCE_CUDA') == '1':
    assert get_compiling_cuda_version() != 'not available', 'mmcv has no CUDA ops'
for device in ['cpu'] + ['cuda'] * torch.cuda.is_available():
    boxes = torch.tensor([[0., 0., 9., 9.], [0., 0., 9., 8.]], device=device)
    kept, _ = nms(boxes, torch.tensor([0.9, 0.8], device=device), 0.5)
    assert len(kept) == 1, kept
PY
}

install_mmcv() {
    if [ $use_venv = no ] && mmcv_works; then return; fi
    local name=${mmcv%%==*}
    # A ready wheel, if pip finds one. It may have been built for another torch.
    if pip_install --only-binary "$name" --constraint "$constraints" "$mmcv" >"$log" 2>&1; then
        if mmcv_works; then
            say "        took a ready one"
            return
        fi
        say "        the ready one does not work with this torch"
    fi
    say "        compiles mmcv and its ops: 7 to 10 minutes on 2 cores, longer for a GPU"
    # Not the cache: a wheel in it may have been built for another torch.
    CFLAGS="${CFLAGS:--g0 -O2}" MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc 2>/dev/null || echo 2)} quietly \
        "mmcv needs gcc and g++, and for a GPU an nvcc of torch's CUDA version. With too little memory: MAX_JOBS=1." \
        pip_install --no-build-isolation --no-binary "$name" --no-cache-dir --force-reinstall --no-deps "$mmcv"
    quietly "$network" pip_install --constraint "$constraints" "$mmcv"
    mmcv_works || {
        tail -n 20 "$log" >&2
        fail "mmcv was compiled, but 'from mmcv.ops import nms' does not run" \
            "Does torch work? Try: $python -c 'import torch; print(torch.__version__)'" \
            "With a GPU, nvcc must have the same CUDA major version as torch."
    }
}

install_rest() {
    # mmcv stands in the list as well and is there already; without isolation,
    # since source packages would otherwise each fetch their own build tools.
    local lists=(-r "$wanted")
    if [ $dev = yes ]; then
        lists+=(-r requirements/dev.txt)
        [ "$STACK" != onedl ] || lists+=(-r requirements/rotated-onedl.txt)
    fi
    quietly "$network" pip_install --no-build-isolation --constraint "$constraints" "${lists[@]}"
    quietly "$network" pip_install --no-deps -r "requirements/mim-$STACK.txt"
    # 20,000 files on all cores: pip takes one after another. Left to the first import, it would be made anew by every
    # process that may not write it (PYTHONDONTWRITEBYTECODE): then `import mmdet.models` takes 16 s instead of 7.
    # A few files of packages are templates and no Python.
    [ $use_venv = no ] || "$python" -m compileall -qq -j 0 "$venv"/lib/python*/site-packages || true
}

verify() {
    mmcv_works || {
        tail -n 20 "$log" >&2
        fail "'from mmcv.ops import nms' does not run" \
            "mmcv was built for another torch, or another package replaced it." \
            "Remove it ($python -m pip uninstall -y ${mmcv%%==*}; rm -rf $venv/.stamps) and run this again."
    }
    quietly "The error above names the package that does not load." \
        "$python" -c 'import mmpretrain, mmdet, mmseg, mim'
}

install_package() {
    quietly "Read the error above; it comes from this project's setup.py." \
        pip_install --no-deps --no-build-isolation --editable .
}

# ---- go --------------------------------------------------------------------

if [ $use_venv = yes ]; then
    say "Installing the $STACK stack into ${venv##*/}; in all 2 to 4 minutes, 7 to 10 more if mmcv must be compiled."
    # The path is part of the key: the scripts of a moved environment do not start.
    venv_key="$(digest) $venv"
    step venv "$venv_key" "virtual environment ${venv##*/} ($("$python" -V))" "5 s" make_venv
    python=$venv/bin/python
else
    say "Installing the $STACK stack into the environment of $(command -v "$python")"
fi

stack_files=(requirements/common.txt requirements/*"$STACK".txt requirements/dev.txt requirements/deploy.txt)
step torch "$(digest requirements/torch.txt)" \
    "torch and torchvision" "60 to 100 s, several GB with CUDA" install_torch
step build "$(digest requirements/build.txt)" \
    "build tools: setuptools, wheel, ninja, psutil" "5 s" \
    quietly "$network" pip_install -r requirements/build.txt
step mmcv "$mmcv $(digest requirements/torch.txt)" \
    "$mmcv with its ops" "10 s from a wheel, 7 to 10 minutes when compiled on 2 cores" install_mmcv
step stack "$(digest "${stack_files[@]}") $dev" \
    "MMEngine, mmpretrain, mmdet, mmsegmentation, mim, test tools" "1 to 2 minutes" install_rest
step verify "$mmcv $(digest requirements/torch.txt "${stack_files[@]}")" \
    "check: from mmcv.ops import nms; the packages load" "10 s" verify
# What the build of this package depends on: its metadata, its native sources, torch.
mapfile -t sources < <(find mmlocalmamba -name '*.cpp' -o -name '*.cu' -o -name '*.h' | sort)
# The links that an editable install puts into the source tree may have been cleaned away.
[ -e mmlocalmamba/.mim/configs ] || rm -f "$venv/.stamps/package"
step package "$root $(digest setup.py pyproject.toml requirements/torch.txt mmlocalmamba/__init__.py "${sources[@]}")" \
    "mmlocalmamba itself, editable, with its CPU kernel" "10 to 60 s" install_package

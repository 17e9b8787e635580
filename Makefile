# STACK: openmmlab (default) or onedl. PYTHON: the interpreter that the environment is built on. MMCV: torchvision or
# compiled, see tools/install.sh.
STACK ?= openmmlab
PYTEST_ARGS ?=
# The number of processes that run tests. Each takes a core and about 2 GB of memory. 0 runs the tests in pytest's own
# process, as a debugger needs. nproc obeys OMP_NUM_THREADS, which is set below.
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
TESTS := tests $(wildcard research/tests)

ifeq ($(STACK),onedl)
VENV := .venv-onedl
# OneDL's mim finds `mmdet` ambiguous.
MIM_DET := mmdetection
else
VENV := .venv
MIM_DET := mmdet
endif
BIN := $(CURDIR)/$(VENV)/bin

DEMO_CONFIG := configs/mask-rcnn_localvmamba-nano_digits.py
DEMO_DATA := data/digits
DEMO_DIR := work_dirs/demo

WEB := docs/demo

# The tensors of the tests and the demo are small, so a second thread costs more than it saves. Threads that spin while
# they wait starve the data loader: an iteration takes 5.2 s instead of 0.36 s on 2 cores.
OMP_NUM_THREADS ?= 1
OMP_WAIT_POLICY ?= PASSIVE
export STACK PYTHON MMCV OMP_NUM_THREADS OMP_WAIT_POLICY

# `install` and `stack` change the same environment, also under make -j.
.NOTPARALLEL:

.PHONY: help install stack demo test test-all coverage image-test slurm-test audit smoke docs web-demo web-demo-test lint \
	wheels clean

help:
	@echo "make demo      install, write the demo data, train a detector, evaluate, draw (about 9 minutes)"
	@echo "make test      install, run the fast tests; PYTEST_ARGS='-k scans' passes arguments on,"
	@echo "               WORKERS=2 sets how many run at once (default: one per core, at most 8)"
	@echo "make test-all  run all tests (an hour on 2 cores); TEST_SHARE=0/3 takes a third of the slow ones"
	@echo "make coverage  run the fast tests and list the lines that they do not reach"
	@echo "make image-test  build and run the container image (root; Debian's docker.io, debootstrap; docs/jobs.md)"
	@echo "make slurm-test  run a job on a Slurm of two nodes (root; Debian's slurmctld, slurmd, munge; docs/jobs.md)"
	@echo "make audit     write a bill of materials, look up known vulnerabilities of the pinned packages (asks PyPI)"
	@echo "make smoke     install, build every configuration; train, resume and test each task on tiny data"
	@echo "make install   install only"
	@echo "make docs      build the documentation into docs/_build (Python >= 3.11; its own environment, 10 s)"
	@echo "make web-demo  build the browser demo in docs/demo/_build (npm; packaged weights, no training)"
	@echo "make web-demo-test   build the browser demo and test it in a headless Chromium (npm, chromium)"
	@echo "make lint      run ruff and mypy"
	@echo "make wheels    write the source distribution and both wheels into dist/ (CONTRIBUTING.md)"
	@echo "make clean     remove everything that these commands made"
	@echo "STACK=onedl after a command takes the OneDL stack instead of OpenMMLab, MMCV=compiled compiles all of mmcv's ops."

install:
	@bash tools/install.sh

# Without the tools, the demo is there a minute earlier.
stack:
	@bash tools/install.sh --no-dev

$(DEMO_DATA): | stack
	@echo "Writing the demo data into $(DEMO_DATA)"
	@$(BIN)/python tools/dataset_converters/digits.py $(DEMO_DATA)

# 5 epochs of the configuration's 12, for the time, in batches of half the size. With --resume an interrupted training
# continues and a finished one is not repeated.
demo: stack | $(DEMO_DATA)
	@echo "Training into $(DEMO_DIR): about 5 minutes on 2 cores; remove the folder to start again"
	@PATH="$(BIN):$$PATH" mim train $(MIM_DET) $(DEMO_CONFIG) --work-dir $(DEMO_DIR) --resume \
		--cfg-options train_cfg.max_epochs=5 train_cfg.val_interval=5 train_dataloader.batch_size=4
	@$(BIN)/python tools/demo.py $(DEMO_CONFIG) $(DEMO_DIR)
	@echo "The other pages' commands need this environment: source $(VENV)/bin/activate"

test: install
	@$(PYTEST) -m "not slow" $(TESTS) $(PYTEST_ARGS)

test-all: install
	@$(PYTEST) --durations=25 $(TESTS) $(PYTEST_ARGS)

coverage: install
	@$(PYTEST) -m "not slow" --cov --cov-report=term-missing:skip-covered $(TESTS) $(PYTEST_ARGS)

# ENGINE=podman or ENGINE=buildah takes another engine; IMAGE_CACHE=FOLDER keeps the layers.
image-test: install
	@$(BIN)/python -m pytest -v -s tests/systems/test_image.py $(PYTEST_ARGS)

slurm-test: install
	@$(BIN)/python -m pytest -v tests/systems/test_slurm.py $(PYTEST_ARGS)

smoke: install
	@PATH="$(BIN):$$PATH" $(BIN)/python tests/systems/smoke.py

# Sphinx does not import the package, so this needs neither torch nor the stack.
DOCS_BIN := .venv-docs/bin
DOCS_PYTHON = $(or $(PYTHON),$(shell command -v python3.11 || command -v python3))

.venv-docs/.stamp: requirements/docs.txt
	@echo "Installing Sphinx into .venv-docs"
	@$(DOCS_PYTHON) -m venv --clear .venv-docs
	@$(DOCS_BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/docs.txt
	@touch $@

docs: .venv-docs/.stamp
	@$(DOCS_BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env docs docs/_build
	@echo "docs/_build/index.html"

# ---- audit ----

.venv-audit/.stamp: requirements/audit.txt
	@$(DOCS_PYTHON) -m venv --clear .venv-audit
	@.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/audit.txt
	@touch $@

# --strict makes a package that could not be looked up an error.
audit: .venv-audit/.stamp | install
	@mkdir -p build
	@.venv-audit/bin/cyclonedx-py environment --output-file build/sbom-$(STACK).json $(BIN)/python
	@echo "build/sbom-$(STACK).json"
	@.venv-audit/bin/pip-audit --strict --disable-pip --no-deps \
		-r requirements/torch.txt -r requirements/constraints-$(STACK).txt

# ---- browser demo ----

$(WEB)/node_modules/.package-lock.json: $(WEB)/package-lock.json
	@command -v npm > /dev/null || { echo "npm is not installed: apt-get install npm (Node.js >= 18)"; exit 1; }
	@npm ci --prefix $(WEB) --ignore-scripts --no-audit --no-fund

web-demo: $(WEB)/node_modules/.package-lock.json | install $(DEMO_DATA)
	@$(BIN)/python docs/demo/web_demo.py build

web-demo-test: web-demo
	@$(BIN)/python docs/demo/web_demo.py test

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# With this environment's torch the wheel has the native kernel. pip's isolated build has no torch: that wheel is pure.
wheels: install
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/publish.txt
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist
	@PATH="$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		--wheel-dir dist dist/*-linux_*.whl
	@rm dist/*-linux_*.whl
	@$(BIN)/python -m build --wheel --outdir dist/pure
	@ls -l dist dist/pure

clean:
	rm -rf .venv .venv-onedl .venv-docs .venv-audit build dist docs/_build $(WEB)/_build $(WEB)/node_modules \
		$(DEMO_DATA) $(DEMO_DIR) mmlocalmamba/.mim mmlocalmamba/ops/*.so

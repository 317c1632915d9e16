# make demo: set up, then GRPO end to end on the CPU.   make test: set up, then every check.
# The packages come from your pip's index. TORCH_INDEX names an index of CPU-only PyTorch wheels, if you have one:
#   make demo TORCH_INDEX=https://...
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Two processes have the tests on Slurm, and wait for it much of the time: four keep two cores busy.
PYTEST_ARGS ?= --numprocesses=4 --dist=loadgroup --no-loadscope-reorder

PIP = $(VENV)/bin/python -m pip --no-input --disable-pip-version-check --quiet --quiet
REQUIREMENTS = pyproject.toml constraints.txt
CHECKED = realsr_hpc tools tests

.PHONY: demo test check install install-dev clean

demo: $(VENV)/.installed
	$(VENV)/bin/python tools/demo.py

test: check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check $(CHECKED)
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else "Python 3.11 or 3.12 is needed; this is %d.%d. Name one: make PYTHON=python3.11" % v)'
	@echo "Installing into $(VENV): minutes, the first time alone."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(REQUIREMENTS)
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed $(REQUIREMENTS)
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache build dist

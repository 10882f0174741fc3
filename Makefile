# Every target makes .venv when it is missing or older than what it is made from, and then does its work.
PYTHON ?= python3
EXTRAS := cpu,triton,cuda,hf,train,eval,docs,notebooks,dev
RUN := .venv/bin/python -m
INSTALLED := .venv/.installed

.PHONY: help compare test test-gpu sanitize docs lab

help:
	@echo 'make compare   the reference beside every backend this machine has: outputs, gradients, times, a figure'
	@echo 'make test      lint, every test, every notebook'
	@echo 'make test-gpu  every test that a GPU is for, with the packages that PYTHON has: installs nothing'
	@echo 'make sanitize  the CUDA kernels under memcheck, racecheck and initcheck; installs nothing'
	@echo 'make docs      the documentation as a site in out/site/html, which needs no server and no network'
	@echo 'make lab       JupyterLab on notebooks/'
	@echo 'The first one makes .venv; PYTHON=python3.12 make ... makes it from that Python (3.10 to 3.14).'

compare: $(INSTALLED)
	$(RUN) mamba_ref.compare mamba_fast:selective_scan_fn --every-backend
	$(RUN) mamba_ref.compare mamba_fast:selective_scan_fn --every-backend --text README.md

test: $(INSTALLED)
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) pytest -n 2 --dist loadfile
	$(RUN) pytest -n 2 --dist loadfile --nbval --nbval-current-env --nbval-cell-timeout 120 \
		--nbval-sanitize-with tests/nbval_sanitize.cfg notebooks

# Several processes where pytest-xdist is there: most of the time goes into compiling.
test-gpu:
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest -o minversion=7 -p no:cacheprovider -p no:benchmark -q \
		$(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo '-n 8') -m 'gpu or triton or cuda' tests/mamba_fast

sanitize:
	for tool in memcheck racecheck initcheck; do \
		compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 1 $(PYTHON) tests/sanitize_cuda.py || exit 1; done

docs: $(INSTALLED)
	.venv/bin/python docs/site/build.py
	@echo 'Open out/site/html/index.html in a browser.'

lab: $(INSTALLED)
	$(RUN) jupyterlab notebooks

# The stamp holds the folder it was made in: an environment that was moved or copied runs the old folder's code.
ifneq ($(shell cat $(INSTALLED) 2>/dev/null),$(CURDIR))
.PHONY: $(INSTALLED)
endif

$(INSTALLED): pyproject.toml constraints.txt | .venv/bin/pip
	@echo 'Installing into .venv: about a minute, and several GB to download where torch comes with CUDA.'
	@[ -t 1 ] || quiet=--quiet; \
		$(RUN) pip install $$quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@echo '$(CURDIR)' > $@

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))' || { \
		echo '$(PYTHON) is not one of Python 3.10 to 3.14, which torch 2.13.0 is built for.' >&2; \
		echo 'Name another one: PYTHON=python3.13 make ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo '$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv' >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv

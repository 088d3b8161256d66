# `make demo`, `make test`, `make service`: each sets up all it needs in .venv and rebuilds what was edited.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

ASV    := cd benchmarks && ../$(BIN)/asv

# How much of the history the dashboard shows, and which benchmarks are run: a regular expression, as networks.Step
COMMITS ?= 5
BENCH ?= .

# The service: MODE=gunicorn (WORKERS processes) or MODE=uvicorn (WORKERS threads; all usable cores), a port of 127.0.0.1.
PORT ?= 8000
WORKERS ?= $(shell PYTHONPATH=examples $(BIN)/python -m service.cores)
serve-gunicorn = PORT=$(PORT) WEB_CONCURRENCY=$(WORKERS) \
	$(BIN)/python -m gunicorn --config examples/service/gunicorn.conf.py
serve-uvicorn  = WEB_CONCURRENCY=1 SERVICE_THREADS=$(WORKERS) \
	$(BIN)/python -m uvicorn --host 127.0.0.1 --port $(PORT) --app-dir examples --factory service.app:create_app --no-access-log

SOURCES := setup.py pyproject.toml $(shell find src -name '*.py' -o -name '*.pyx' -o -name '*.px[di]' -o -name '*.pyi' -o -name '*.h')

.PHONY: demo lectures service load test test-large sanitize tsan valgrind bench dashboard bench-compare test-dashboard compare latency \
	performance plots docs lint clean

demo: $(VENV)/.installed $(VENV)/.examples  ## train on handwritten digits, with and without batch normalization
	$(BIN)/python examples/digits.py

lectures: $(VENV)/.installed $(VENV)/.examples  ## the lectures' claims, measured and drawn: docs/lectures.md
	PYTHONPATH=examples $(BIN)/python -m lectures $(ONLY)

service: $(VENV)/.installed $(VENV)/.service digits.npz  ## the trained network over HTTP
	$(or $(serve-$(or $(MODE),gunicorn)),$(error MODE is gunicorn or uvicorn, got $(MODE)))

load: $(VENV)/.installed $(VENV)/.service digits.npz  ## how much the service bears: starts it, or asks the one at URL
	PYTHONPATH=examples $(BIN)/python -m service.load --workers $(WORKERS) $(if $(MODE),--mode $(MODE)) $(if $(URL),--url $(URL)) \
		$(if $(DURATION),--seconds $(DURATION))

digits.npz: examples/networks.py | $(VENV)/.installed $(VENV)/.examples
	$(BIN)/python examples/digits.py --only-save

test: $(VENV)/.installed $(VENV)/.test  ## the whole test suite
	$(BIN)/python -m pytest

test-large: $(VENV)/.installed $(VENV)/.test  ## arrays of more than 2^31 elements: 18 GB of memory, four minutes
	$(BIN)/python -m pytest -m large

bench: $(VENV)/.installed $(VENV)/.bench  ## asv on the working tree, and a table of what it found
	$(ASV) machine --yes
	$(ASV) --config asv.here.json run --python=same --set-commit-hash=$$(git rev-parse HEAD) --bench "$(BENCH)"
	$(BIN)/python benchmarks/report.py

# What is measured changes with the sources alone. (asv ends with 2 where a benchmark failed; the others are shown.)
dashboard: $(VENV)/.created $(VENV)/.bench  ## asv on the last COMMITS commits that it has not seen, shown in a browser
	mkdir -p .asv
	git log -n $(COMMITS) --format=%H -- src setup.py > .asv/commits
	$(ASV) machine --yes
	$(ASV) run --skip-existing-commits --bench "$(BENCH)" HASHFILE:../.asv/commits || test $$? -eq 2
	$(BIN)/python benchmarks/publish.py
	$(ASV) preview

# Many rounds of few samples: what differs from process to process must not look like a difference between commits.
bench-compare: $(VENV)/.created $(VENV)/.bench  ## HEAD against BASE: fails where something takes 10 % longer
	@test -n "$(BASE)" || { echo "say which commit: make bench-compare BASE=HEAD~1 [BENCH=networks.Step]"; exit 2; }
	$(ASV) machine --yes
	$(ASV) continuous --factor 1.1 --split --interleave-rounds -a rounds=8 -a repeat=2 --bench "$(BENCH)" "$(BASE)" HEAD

test-dashboard: $(VENV)/.installed $(VENV)/.test $(VENV)/.dashboard  ## the published pages in a browser, after `make bench`
	$(BIN)/python -m pytest tests/test_dashboard.py

compare: .venv-compare/.installed  ## cybn beside PyTorch, ONNX Runtime and the reference
	.venv-compare/bin/python benchmarks/compare.py

latency: .venv-compare/.installed  ## percentiles of small calls, on an idle machine and a busy one
	.venv-compare/bin/python benchmarks/latency.py

performance: .venv-compare/.installed  ## measure what docs/performance.md shows, and draw it
	.venv-compare/bin/python benchmarks/compare.py --save benchmarks/results/compare.json
	.venv-compare/bin/python benchmarks/scaling.py
	.venv-compare/bin/python benchmarks/plots.py

plots: $(VENV)/.created $(VENV)/.plots  ## draw docs/performance/ again from the saved results
	$(BIN)/python benchmarks/plots.py

docs: $(VENV)/.installed $(VENV)/.docs  ## every public name, its signature and docstring: build/docs/index.html
	$(BIN)/python -m pdoc --docformat numpy --output-directory build/docs cybn

lint: $(VENV)/.dev  ## what pre-commit runs
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint src

# What is loaded into a Python that was built without it. Leaks cannot be told from what CPython keeps until its end.
ASAN = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	UBSAN_OPTIONS=print_stacktrace=1
# Without what starts processes or forks (the tool would be loaded into them) and what measures memory or pictures.
UNSANITIZED := benchmarks dashboard package performance config memory threads team embedding service lanes

sanitize: .venv-sanitize/.installed  ## the suite under AddressSanitizer and UndefinedBehaviorSanitizer
	$(ASAN) HYPOTHESIS_PROFILE=sanitize .venv-sanitize/bin/python -m pytest --capture=sys -p no:faulthandler -o timeout=900 \
		$(patsubst %,--ignore=tests/test_%.py,$(UNSANITIZED))

# TSan cannot place its memory where the kernel has randomized too much of it.
tsan: .venv-tsan/.installed  ## threads under ThreadSanitizer
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" OMP_NUM_THREADS=4 PYTHONMALLOC=malloc \
		TSAN_OPTIONS="suppressions=tests/tsan.supp exitcode=66" \
		PYTHONPATH=tests setarch -R .venv-tsan/bin/python tests/sanitize_run.py

valgrind: $(VENV)/.installed $(VENV)/.test  ## small arrays under memcheck: what has a frame of cybn counts
	PYTHONPATH=tests PYTHONMALLOC=malloc valgrind --quiet --log-file=build/valgrind.log --num-callers=30 \
		$(BIN)/python tests/sanitize_run.py --small
	! grep -B 30 -E "cybn|_ops|_layer|_arrays|_schedule|_memory|_kernels|baseline|x86_v3" build/valgrind.log

clean:
	rm -rf $(VENV) .venv-sanitize .venv-tsan build src/*.egg-info

# Dependency groups, each installed once and again when pyproject.toml changes.
$(VENV)/.%: pyproject.toml | $(VENV)/.created
	$(PIP) install --group $*
	touch $@

# setuptools would install modules that were deleted since, from its build directories.
without-deleted = mkdir -p build && find build -path '*/lib*' -name '*.py*' -delete

$(VENV)/.installed: $(SOURCES) | $(VENV)/.build
	@$(without-deleted)
	$(PIP) install --no-build-isolation --no-deps --force-reinstall .
	touch $@

# Environments of their own: the peers', and builds that look for errors.
.venv-compare/.installed: GROUP = compare
.venv-sanitize/.installed: SANITIZERS = address,undefined
.venv-tsan/.installed: SANITIZERS = thread
.venv-sanitize/.installed .venv-tsan/.installed: GROUP = test
.venv-compare/.installed .venv-sanitize/.installed .venv-tsan/.installed: $(SOURCES)
	test -d $(@D) || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --quiet install --upgrade pip
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --group build --group $(GROUP)
	@$(without-deleted)
	CYBN_SANITIZE=$(SANITIZERS) $(@D)/bin/python -m pip --disable-pip-version-check --quiet install \
		--no-build-isolation --no-deps --force-reinstall .
	touch $@

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	touch $@

# Or make would take these stamps for intermediate files and delete them.
.PRECIOUS: $(VENV)/.%

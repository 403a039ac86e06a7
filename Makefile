# Everything a developer does, each target with its own set-up. A fresh machine needs python3 (>= 3.11), make and gcc.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test quick slow lint nightly audit zarr-oldest coverage docs release bench bench-quick gpu gpu-bare gpu-bench tiny clean
TESTS := -n 2 --dist worksteal

demo: $(READY)  ## the main job on the embedded model, with its report in demo/
	$(BIN)/featcache demo

test: $(READY)  ## linters, types, layers, all tests but the nightly ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build
	$(BIN)/mypy > build/mypy.txt & types=$$!; \
	$(BIN)/python -m pytest $(TESTS) -m "not nightly and not gpu"; tests=$$?; \
	wait $$types || { cat build/mypy.txt; tests=1; }; exit $$tests

quick: $(READY)  ## linters and the fast tests, in under two minutes: what to run while working
	$(BIN)/ruff check .
	$(BIN)/python -m pytest $(TESTS) -m "not slow and not nightly and not gpu"

slow: $(READY)  ## measure which tests make quick leaves out
	$(BIN)/python -m pytest $(TESTS) -m "not nightly and not gpu" --junitxml build/tests.xml
	$(BIN)/python -m tools.slow_tests build/tests.xml

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

nightly: $(READY) zarr-oldest interop audit  ## the long checks too, and an hour of fuzzing
	$(BIN)/python -m pytest $(TESTS) -m "not gpu" --hypothesis-profile=nightly

zarr-oldest: $(READY)  ## the stores under the oldest zarr that is allowed
	$(BIN)/python -m pip install --quiet --no-deps --target build/zarr-oldest zarr==3.1.3 crc32c==2.9.post0
	PYTHONPATH=build/zarr-oldest $(BIN)/python -m pytest tests/test_featcache/encoding/test_encode.py tests/test_featcache/store/test_readers.py

interop: $(READY)  ## features to and from other programs, by the programs themselves
	$(BIN)/python -m pip install --quiet --constraint constraints.txt clip-benchmark dask ipykernel lancedb mteb nbclient pylance xarray
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps embedding-reader  # it asks for pandas 2
	$(BIN)/python -m pytest tests/test_featcache/transfer/test_other_programs.py tests/test_featcache/store/test_interchange.py tests/test_featcache/test_notebook.py

audit: $(READY)  ## the pinned versions against the published advisories; reports what could not be looked up, and continues
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip-audit || { echo "audit skipped: pip-audit cannot be installed"; exit 0; }; \
	$(BIN)/python -m tools.audit constraints.txt

coverage: $(READY)  ## line coverage of the three packages
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pytest-cov
	$(BIN)/python -m pytest $(TESTS) -m "not nightly and not gpu" --cov=featcache --cov=heads --cov=ft --cov-report=term-missing:skip-covered

docs: $(READY)  ## the documentation as a site, in build/site; broken links are errors
	$(BIN)/python -m pip install --quiet --constraint constraints.txt mkdocs mkdocstrings-python
	$(BIN)/mkdocs build --strict --site-dir build/site

release: $(READY)  ## build the distribution, install it in a fresh environment, run the demo, and tag the commit
	test -z "$$(git status --porcelain)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build
	rm -rf dist build/release && $(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/release && build/release/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && release/bin/featcache demo
	git tag --annotate "v$$($(BIN)/python -c 'import featcache; print(featcache.__version__)')" --message "Release"

bench: $(READY)  ## every benchmark at full size, results into benchmarks/results
	$(BIN)/python -m benchmarks.bench_store --out benchmarks/results/store.json
	$(BIN)/python -m benchmarks.bench_verify --out benchmarks/results/verify.json
	$(BIN)/python -m benchmarks.bench_store_write --out benchmarks/results/store-write.json
	$(BIN)/python -m benchmarks.bench_writers --out benchmarks/results/writers.json
	$(BIN)/python -m benchmarks.bench_encode --out benchmarks/results/encode.json
	$(BIN)/python -m benchmarks.bench_precision --out benchmarks/results/precision.json
	$(BIN)/python -m benchmarks.bench_preparation --out benchmarks/results/preparation.json
	$(BIN)/python -m benchmarks.bench_texts --out benchmarks/results/texts.json
	$(BIN)/python -m benchmarks.bench_ridge --modes --out benchmarks/results/ridge.json
	$(BIN)/python -m benchmarks.bench_himalaya --out benchmarks/results/himalaya.json
	$(BIN)/python -m benchmarks.bench_nll --out benchmarks/results/nll.json
	$(BIN)/python -m benchmarks.bench_logistic --enough 16 --real oxford_pets oxford_flowers ucf101 --out benchmarks/results/logistic.json
	$(BIN)/python -m benchmarks.bench_one_c --out benchmarks/results/one-c.json
	$(BIN)/python -m benchmarks.bench_multilabel --out benchmarks/results/multilabel.json
	$(BIN)/python -m benchmarks.bench_finetune --out benchmarks/results/finetune.json
	$(BIN)/python -m benchmarks.bench_slow_heads --out benchmarks/results/slow-heads.json
	$(BIN)/python -m benchmarks.bench_default_path --out benchmarks/results/default-path.json
	$(BIN)/python -m benchmarks.bench_calls --out benchmarks/results/calls.json

bench-quick: $(READY)  ## the main ratios against those committed last, in under ten minutes; fails where one is worse
	$(BIN)/python -m benchmarks.quick

gpu: $(READY)  ## everything marked gpu
	$(BIN)/python -m pytest -m gpu

gpu-bare:  ## GPU tests and benchmarks with any Python that has torch; installs nothing
	$(PYTHON) -m benchmarks.gpu_bare

gpu-bench: $(READY)
	$(BIN)/python -m benchmarks.bench_encode --device cuda --out benchmarks/results/encode-gpu.json
	$(BIN)/python -m benchmarks.bench_finetune --device cuda --batch-size 256 --precision bf16 --out benchmarks/results/finetune-gpu.json
	$(BIN)/python -m benchmarks.bench_nll_gpu --out benchmarks/results/nll-gpu.json
	$(BIN)/python -m benchmarks.bench_solvers_gpu --out benchmarks/results/solvers-gpu.json

tiny: $(READY)  ## train the embedded model again (about half an hour on two cores, needs Debian's fonts)
	$(BIN)/python -m tools.train_tiny --seed 0 --out featcache/encoders/tiny

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

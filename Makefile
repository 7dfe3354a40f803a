# make demo · make test · make docs · make lint · make bench.  PYTHON=python3.12 picks another interpreter and JAX=0.11.2 another version of JAX
# than requirements.lock has, each with an environment of its own.
PYTHON ?= python3
ifeq ($(origin PYTHON), command line)
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
else
VENV := .venv
endif
ifdef JAX
VENV := $(VENV)-jax-$(JAX)
endif
RUN := $(VENV)/bin/python
READY := $(VENV)/ready

.PHONY: demo test parity docs links lint package bench bench-baselines bench-solvers bench-images bench-networks bench-train bench-orders bench-parallel bench-couplings bench-published bench-flow-maps others gpu tpu-aot gpu-aot env lock clean

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(if $(JAX),$(RUN) -m pip install --quiet --disable-pip-version-check "jax==$(JAX)" "jaxlib==$(JAX)")
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

env: $(READY)  ## builds .venv from the pinned versions

# Takes memory in huge pages: the faults of small ones cost a sixth of a training step on a CPU (glibc 2.35 or newer; docs/networks.md).
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
demo: $(READY)  ## trains on real digits and draws what it learnt: 2 to 3 minutes on two cores
	$(RUN) -m experiments.images digits $(ARGS)

# NOTES=folder compares the index of formulas with the course notes, which are not in the repository.
ifdef NOTES
test: export FMJAX_NOTES = $(NOTES)
endif
test: $(READY)  ## the whole suite; ARGS="-k paths" picks
	$(RUN) -m pytest --numprocesses auto $(ARGS)

parity: .venv.parity/ready  ## runs the official code of published networks, OFFICIAL=folder, and compares what it gives with tests/official
	OFFICIAL=$(OFFICIAL) PYTHONPATH=tests .venv.parity/bin/python -m official

docs: $(READY)  ## the site, in docs/_build/html: runs every page, and fails where one does not
	$(RUN) -m sphinx --builder html --jobs auto --fail-on-warning --keep-going --quiet docs docs/_build/html $(ARGS)

links: $(READY)  ## asks every link of the site that leads outside; needs a network
	$(RUN) -m sphinx --builder linkcheck --define nb_execution_mode=off docs docs/_build/links

lint: $(READY)  ## ruff and pyright
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

package:  ## builds the wheel and the sdist, and tries the wheel in an empty environment with the core dependencies alone
	rm -rf dist .venv.package
	$(PYTHON) -m venv .venv.package
	.venv.package/bin/python -m pip install --quiet --disable-pip-version-check build
	.venv.package/bin/python -m build --outdir dist .
	rm -rf .venv.package && $(PYTHON) -m venv .venv.package
	.venv.package/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock dist/*.whl
	cp tests/smoke.py dist/ && cd dist && ../.venv.package/bin/python smoke.py ../README.md

bench: $(READY)  ## one JSON line per number
	$(RUN) -m benchmarks.sampling $(ARGS)

bench-baselines: .venv.baselines/ready  ## the same beside diffrax, torchdiffeq, flow_matching and diffusers, in an environment of its own
	.venv.baselines/bin/python -m benchmarks.sampling $(ARGS)

bench-solvers: .venv.baselines/ready  ## error against evaluations for every solver, beside diffusers' schedulers
	.venv.baselines/bin/python -m benchmarks.solvers $(ARGS)

bench-images: .venv.baselines/ready  ## images per second of a guided sampler, DiT-XL/2 on a GPU, beside PyTorch
	.venv.baselines/bin/python -m benchmarks.train_step --only sample $(ARGS)

bench-networks: .venv.baselines/ready  ## the train step in its variants, beside PyTorch: time, memory, compile time
	.venv.baselines/bin/python -m benchmarks.train_step --variants scan remat unrolled $(ARGS)

bench-train: $(READY)  ## the train step of DiT-{S,B,L,XL}/{2,4,8}: ARGS="--model DiT-XL/2"
	$(RUN) -m benchmarks.train_step $(ARGS)

bench-orders: $(READY)  ## how fast every step converges, and what noise does to a learnt velocity
	$(RUN) -m benchmarks.orders $(ARGS)

bench-parallel: $(READY)  ## what the loop, the sharding and the checkpoints cost
	$(RUN) -m benchmarks.parallel $(ARGS)

bench-couplings: .venv.baselines/ready  ## couplings beside POT, and a paper's training beside torchcfm
	.venv.baselines/bin/python -m benchmarks.couplings $(ARGS)

bench-published: .venv.baselines/ready  ## loading published networks, and images per second beside diffusers and torch-fidelity
	.venv.baselines/bin/python -m benchmarks.published $(ARGS)

bench-flow-maps: $(READY)  ## steps of MeanFlow over steps of flow matching, and one-step samples
	$(RUN) -m benchmarks.flow_maps $(ARGS)

others: .venv.baselines/ready  ## runs what docs/guides/from_other_libraries.md sets beside ours; hackable_diffusion from the PYTHONPATH
	.venv.baselines/bin/python -m benchmarks.other_libraries $(ARGS)

gpu:  ## what only a GPU can say, in nine minutes and without a network: PYTHON has jax for CUDA; ARGS="--only train" picks
	$(PYTHON) -m benchmarks.gpu $(ARGS)

tpu-aot: .venv.tpu/ready  ## compiles train steps for real TPUs without one: memory and collectives
	.venv.tpu/bin/python -m benchmarks.aot $(ARGS)

gpu-aot: .venv.gpu/ready  ## the same for GPUs
	.venv.gpu/bin/python -m benchmarks.aot --platform cuda $(ARGS)

.venv.tpu/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv.tpu
	.venv.tpu/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock "libtpu==0.0.42.*"
	.venv.tpu/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.venv.gpu/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv.gpu
	.venv.gpu/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock "jax[cuda12]==0.10.2"
	.venv.gpu/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.venv.baselines/ready: requirements.lock pyproject.toml benchmarks/baselines.txt
	$(PYTHON) -m venv .venv.baselines
	.venv.baselines/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv.baselines/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c requirements.lock -c benchmarks/baselines.txt
	.venv.baselines/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/baselines.txt
	.venv.baselines/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.venv.parity/ready: tests/official/requirements.txt
	$(PYTHON) -m venv .venv.parity
	.venv.parity/bin/python -m pip install --quiet --disable-pip-version-check -r tests/official/requirements.txt
	touch $@

lock:  ## pins the newest versions that pyproject.toml allows, for every supported Python (needs uv)
	uv pip compile --universal --python-version 3.11 --extra dev --no-emit-index-url --no-header --no-annotate \
		--upgrade pyproject.toml --output-file requirements.lock

clean:
	rm -rf dist build docs/_build .venv .venv-* .venv.package .venv.baselines .venv.parity .venv.tpu .venv.gpu runs .pytest_cache .ruff_cache *.egg-info

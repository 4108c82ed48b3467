# make run     install into .venv if need be, then PreSa on BallRun with the bundled data
# make test    install into .venv if need be, then lint and tests
# make data    the data behind the tables of common/measured, into runs/data: hours; -j2 for two at a time
# make stress  what takes minutes: signals at any moment, full disks (as root), two at a time
# The interpreter can be chosen: make run PYTHON=python3.10

PYTHON ?= $(firstword $(foreach p,python3.11 python3.10 python3,$(if $(shell command -v $(p)),$(p))))
SERVES = import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))
BIN = .venv/bin

DATA ?= runs/data

.PHONY: run test data stress
run: .venv/installed
	$(BIN)/python algorithms/presa.py --task BallRun --data bundled

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

data: $(patsubst %,$(DATA)/Safety%.hdf5,BallRun CarRun DroneRun AntRun BallCircle CarCircle DroneCircle PointCircle1 HalfCheetahVelocity Walker2dVelocity AntVelocity)

$(DATA)/SafetyBallRun.hdf5: FLAGS = --no-next-observations
$(DATA)/SafetyCarRun.hdf5: FLAGS = --steps 800000
$(DATA)/SafetyDroneRun.hdf5: FLAGS = --experts 1 --envs 16 --steps 5000000 --lr 1e-3 --std-start 0.4 --std-end 0.1 --sweep-power 1.25 --best-within 10 20 40
$(DATA)/SafetyAntRun.hdf5: FLAGS = --experts 1 --envs 16 --steps 3000000 --lr 7e-4
$(DATA)/SafetyBallCircle.hdf5: FLAGS = --steps 7000000 --std-end 0.1
$(DATA)/SafetyCarCircle.hdf5: FLAGS = --experts 1 --envs 16 --steps 1500000 --lr 1e-3 --std-end 0.1
$(DATA)/SafetyDroneCircle.hdf5: FLAGS = --experts 1 --envs 16 --steps 5000000 --lr 1e-3 --std-start 0.4 --std-end 0.1 --sweep-power 1.25
$(DATA)/SafetyPointCircle1.hdf5: FLAGS = --experts 1 --envs 16 --steps 800000 --rollout 500 --lr 1e-3 --std-end 0.1
$(DATA)/SafetyHalfCheetahVelocity.hdf5: FLAGS = --experts 1 --envs 16 --steps 1000000 --rollout 500 --lr 1e-3 --std-end 0.1 --episodes 500
$(DATA)/SafetyWalker2dVelocity.hdf5 $(DATA)/SafetyAntVelocity.hdf5: FLAGS = --experts 1 --envs 16 --rollout 500 --episodes 1000
.DELETE_ON_ERROR:  # where an environment fails, the collector writes what it has, and fails
$(DATA)/Safety%.hdf5: | .venv/installed
	@mkdir -p $(DATA)
	$(BIN)/python common/tools/collect.py $* --seed 1 $(FLAGS) --output $@

stress: .venv/installed
	$(BIN)/python -m pytest tests/stress.py

# The mark is made last, so an interrupted install is done again and a finished one is not.
.venv/installed: requirements.txt requirements-no-deps.txt
	@$(PYTHON) -c '$(SERVES)' || { echo "error: Python 3.10 or 3.11 is needed (pybullet has wheels for no newer one), but $(PYTHON) is another; name one: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-no-deps.txt
	@touch $@

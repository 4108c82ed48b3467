"""The command line: what bad input gets to hear, and what is set before torch is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

from algorithms import bc_all, presa
from common.args import parse_args
from tests.conftest import ROOT, assert_refused, command, only_run

import pytest
import torch

TOOLS = ("benchmark", "card", "collect", "evaluate", "label", "pairs", "speed", "watch")
SCRIPTS = sorted(f"algorithms/{path.name}" for path in (ROOT / "algorithms").glob("*.py"))
SCRIPTS += [f"common/tools/{name}.py" for name in TOOLS]
BAD = {
    "unknown task": ("--task BalRun", "--task BalRun: no such task; did you mean BallRun"),
    "negative limit": ("--cost-limits 10 -5", "--cost-limits: give one or more different"),
    "limit nan": ("--cost-limits nan", "--cost-limits: give one or more different finite"),
    "limit twice": ("--cost-limits 10 10", "--cost-limits: give one or more different"),
    "negative seed": ("--seeds -1", "--seeds: give one or more different whole numbers, none neg"),
    "seed too large": (f"--seeds {2**63}", "--seeds: give one or more"),
    "zero steps": ("--steps 0", "--steps 0: must be a finite number, 1 or more"),
    "rate nan": ("--lr nan", "--lr nan: must be a finite number, 0 or more"),
    "a script's own share": ("--delta 1.5", "--delta 1.5: must lie between 0 and 1"),
    "everything dropped": ("--dropout 1", "--dropout 1.0: must be below 1"),
    "no such file": ("--data nowhere.hdf5", "--data nowhere.hdf5: no such file"),
    "no feedback": (
        "--feedback nowhere.npz --cost-limits 20",
        "--feedback nowhere.npz: not a readable",
    ),
    "another task's file": ("--task DroneRun", "two_armed.hdf5: not a dataset of DroneRun"),
    "segment too long": ("--segment-length 41", "--segment-length 41: the longest episode of"),
    "half a step": ("--segment-length 1.5", "--segment-length 1.5: above 1 it counts steps"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_and_code_2(name, two_armed, tmp_path, run_script):
    flags, sentence = BAD[name]
    base = (
        f"--data {two_armed} --output-dir {tmp_path}/out --eval-episodes 0 --bc-steps 1 --steps 1"
    )
    assert_refused(run_script(presa.main, *base.split(), *flags.split()), sentence)
    assert not (tmp_path / "out").exists(), "nothing is written"


@pytest.mark.parametrize("flags", ["--nu-rate 1", "--seeds 0.5", "--device tpu", "--steps many"])
def test_a_flag_that_cannot_be_read_is_tyros_to_explain(flags, run_script):
    code, out, error = run_script(bc_all.main, *flags.split())
    assert code == 2 and out == "" and flags.split()[0] in error and "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(tmp_path, run_script):
    flags = ["--data", "bundled", "--device", "cuda", "--output-dir", tmp_path / "out"]
    assert_refused(run_script(presa.main, *flags), "--device cuda: this machine has no CUDA GPU")
    assert not (tmp_path / "out").exists()


def test_a_run_is_whole_though_nobody_reads_its_output_to_the_end(two_armed, tmp_path):
    """It is in letters that ASCII lacks."""
    flags = f"--data {two_armed} --bc-steps 5 --steps 5 --num-pairs 100 --hidden-size 8"
    words = f"{sys.executable} {ROOT}/algorithms/presa.py {flags} --eval-episodes 1 | head -1"
    variables = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", words], cwd=tmp_path, env=variables, capture_output=True)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr, done.stderr
    assert done.returncode == 0
    assert (only_run(tmp_path / "runs") / "results.json").exists()


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path, run_script):
    code, _, error = run_script(bc_all.main, "--data", tmp_path / "\x1b]0;mine\a.hdf5")
    assert code == 2 and "\\x1b]0;mine\\x07.hdf5: no such file" in error and "\x1b" not in error


@pytest.mark.parametrize("flag", ["--num-pairs", "--hidden-size"])
def test_a_size_beyond_the_machine_is_one_line(flag, two_armed, tmp_path, run_script):
    flags = ("--data", two_armed, "--eval-episodes", 0, "--output-dir", tmp_path, flag, 10**12)
    code, _, error = run_script(presa.main, *flags)
    assert code == 1 and error.startswith("error: ") and "allocate" in error


def test_a_tilde_is_the_home_also_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert parse_args(presa.Args, ["--output-dir=~/runs"]).output_dir == Path("/somewhere/runs")


def test_a_run_that_is_resumed_has_the_flags_it_was_started_with(tmp_path):
    flags = ["--lr", "0.5", "--seeds", "3", "1"]
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags}))
    args = parse_args(presa.Args, ["--resume", str(tmp_path)])
    assert (args.lr, args.seeds, args.resume) == (0.5, (3, 1), tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_how_threads_wait_is_set_before_torch_is_loaded_unless_the_user_has(script, tmp_path):
    """Here torch is a file that says what it finds, and ends the script; run from anywhere."""
    says = "import os\nprint(os.environ.get('GOMP_SPINCOUNT'))\nraise SystemExit\n"
    (tmp_path / "torch.py").write_text(says)
    variables = {"PYTHONPATH": str(tmp_path)}
    done = command(tmp_path, script, **variables)
    assert int(done.stdout) > 0, done.stderr
    if script == "algorithms/presa.py":
        assert command(tmp_path, script, **variables, GOMP_SPINCOUNT="7").stdout == "7\n"

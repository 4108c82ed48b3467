"""What every script must do, shown on all of them, and that they differ only where they may."""

import ast
import inspect
import io
import tokenize
from difflib import unified_diff
from pathlib import Path

from algorithms import (
    bc_all,
    bc_safe,
    bc_safe_seg,
    binary_alignment,
    cdt,
    presa,
    safe_rlhf_cdt,
    unified_comparison,
)
from common import evaluation
from common.evaluation import episode_seed, load_script, play
from common.results import Run
from common.tasks import get_task
from common.tools import evaluate
from tests.conftest import NoWorkers, only_run, real_gymnasium, rows_of, two_armed_arrays

import pytest
import torch

IMITATION, ALIGNMENT = (bc_all, bc_safe, bc_safe_seg), (binary_alignment, unified_comparison)
ALL = (presa, *IMITATION, *ALIGNMENT, cdt, safe_rlhf_cdt)
SMALL = {  # so that a test is quick; of these flags a script is given those that it has
    "hidden-size": 32,
    "bc-steps": 40,
    "model-steps": 40,
    "num-pairs": 200,
    "batch-size": 8,
    "width": 32,
    "layers": 1,
    "heads": 2,
    "context": 4,
    "model-width": 32,
}
each_script = pytest.mark.parametrize("module", ALL, ids=lambda x: x.__name__.rpartition(".")[2])


def small(module) -> list[str]:
    fields = module.Args.__dataclass_fields__
    flags = {name: x for name, x in SMALL.items() if name.replace("-", "_") in fields}
    return [word for name, x in flags.items() for word in (f"--{name}", str(x))]


# ----------------------------------------------------------------------------- what a run leaves


@each_script
def test_a_saved_policy_scores_again_what_it_scored(module, two_armed, tmp_path, run_script):
    flags = f"--data {two_armed} --output-dir {tmp_path}/out --seeds 0 2 --steps 30 --device cpu "
    flags += "--eval-every 60 --log-every 20 --eval-episodes 2"
    code, out, error = run_script(module.main, *flags.split(), *small(module))
    assert code == 0, error
    folder = only_run(tmp_path / "out")
    names = {"config.json", "metrics.csv", "results.json", "policy.pt", "curves.png"}
    extra = {"calibration.png"} if module is safe_rlhf_cdt else set()
    assert {path.name for path in folder.iterdir()} == names | extra
    saved = torch.load(folder / "policy.pt", weights_only=True)
    runs = [(seed, limit) for seed in (0, 2) for limit in (10, 20, 40)]
    played = [row for row in rows_of(folder) if row["normalized_cost"]][-6:]
    assert [(int(x["seed"]), float(x["cost_limit"])) for x in played] == runs
    (policies,) = {len(p) for p in saved["parameters"].values()}
    assert policies == (2 if module is bc_all else 6)

    code, again, error = run_script(evaluate.main, folder, "--episodes", 2)
    assert code == 0, error
    assert again.splitlines()[-1] == out.splitlines()[-1]
    # and scores what a plain player of the game scores
    task, r = get_task("BallRun"), 5
    one = {name: p[r * policies // 6] for name, p in saved["parameters"].items()}
    with real_gymnasium():
        act = module.load_policy(saved["config"], one)
        reward, cost = play(task, act, [episode_seed(2, e) for e in range(2)])
    low, high = saved["reward_range"]
    assert float(played[r]["normalized_reward"]) == pytest.approx(
        (reward.mean() - low) / (high - low), abs=1e-3
    )
    assert float(played[r]["normalized_cost"]) == pytest.approx(cost.mean() / 40, abs=0.02)


@each_script
def test_same_seed_same_bits_and_company_changes_nothing(module, two_armed, run_of):
    flags = [*small(module), "--steps", 20, "--log-every", 20]
    apart = [run_of(module, two_armed, *flags, "--seeds", 3, "--cost-limits", 60) for _ in range(2)]
    assert apart[0][0] == apart[1][0] and apart[0][1]["runs"] == apart[1][1]["runs"]
    together = run_of(module, two_armed, *flags, "--seeds", 1, 3, "--cost-limits", 30, 60)
    alone = apart[0][2]["parameters"]
    loose = {"atol": 2e-3 if module is safe_rlhf_cdt else 3e-4, "rtol": 2e-2}
    for name, value in alone.items():
        assert torch.equal(value, apart[1][2]["parameters"][name])
        torch.testing.assert_close(together[2]["parameters"][name][-1], value[0], **loose)
    first = together[2]["parameters"]
    assert any(not torch.equal(p[0], p[-1]) for p in first.values()), "another seed is another run"
    mine = [row for row in together[0] if (row["seed"], row["cost_limit"]) == ("3", "60.0")]
    for a, b in zip(mine, apart[0][0], strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=2e-3, abs=1e-4)


@each_script
def test_a_run_cut_off_and_resumed_ends_in_the_same_last_bit(
    module, two_armed, tmp_path, run_script, monkeypatch
):
    """Cut off in each stage, after a checkpoint and before the next."""
    flags = f"--data {two_armed} --seeds 0 1 --cost-limits 10 60 --steps 50 --checkpoint-every 15 "
    flags += "--log-every 7 --eval-episodes 0 --device cpu"
    flags = [*flags.split(), *small(module)]
    two_stages = {"bc_steps", "model_steps"} & module.Args.__dataclass_fields__.keys()
    code, _, error = run_script(module.main, *flags, "--output-dir", tmp_path / "whole")
    assert code == 0, error
    whole, log = only_run(tmp_path / "whole"), Run.log
    for cut, last_saved in ((35, 30), (85, 75)) if two_stages else ((35, 30),):
        steps = []

        def cut_off(run, stage, step, metrics, cut=cut):
            if step == cut:
                raise KeyboardInterrupt
            log(run, stage, step, metrics)

        def count(run, stage, step, metrics, steps=steps):
            steps.append(step)
            log(run, stage, step, metrics)

        monkeypatch.setattr(Run, "log", cut_off)
        out = tmp_path / f"cut{cut}"
        assert run_script(module.main, *flags, "--output-dir", out)[0] == 130
        part = only_run(out)
        assert list(part.glob("checkpoint-*.pt")) and not (part / "policy.pt").exists()
        monkeypatch.setattr(Run, "log", count)
        code, _, error = run_script(module.main, "--resume", part)
        assert code == 0, error
        assert steps[0] == last_saved + 1, "not from the start"
        assert {path.name for path in part.iterdir()} == {path.name for path in whole.iterdir()}
        assert rows_of(part) == rows_of(whole)
        first, second = (torch.load(x / "policy.pt", weights_only=True) for x in (whole, part))
        for key, value in first["parameters"].items():
            assert torch.equal(value, second["parameters"][key]), key


# ----------------------------------------------------------------------- a reader changes PreSa

INIT = "        self.output = nn.Linear(hidden_size, action_dim)\n"
MADE = "        policies.append(Policy(*sizes).to(device))\n"
NORMALISER = {
    INIT: f"""{INIT}
        self.register_buffer("mean", torch.zeros(observation_dim))
        self.register_buffer("deviation", torch.ones(observation_dim))
""",
    "self.hidden1(observation)": "self.hidden1((observation - self.mean) / self.deviation)",
    MADE: f"""{MADE}
        policies[-1].mean.copy_(observations.mean(0))
        policies[-1].deviation.copy_(observations.std(0))
""",
}


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """Import a copy of presa.py whose text was changed, so that evaluation finds it as well."""
    monkeypatch.setattr(evaluation, "ALGORITHMS", tmp_path)
    monkeypatch.setattr(evaluation, "ProcessPoolExecutor", NoWorkers)

    def change(name: str, replacements: dict[str, str]):
        source = Path(presa.__file__).read_text()
        for old, new in replacements.items():
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        (tmp_path / f"{name}.py").write_text(source)
        return load_script(name)

    return change


def test_an_observation_normaliser_trains_and_the_saved_policy_plays_the_same(
    changed, two_armed, tmp_path, run_script
):
    """A policy with buffers: they are carried through both stages, and not trained."""
    module = changed("normalised", NORMALISER)
    flags = f"--data {two_armed} --output-dir {tmp_path}/out --seeds 0 1 --steps 30 --device cpu "
    flags += "--eval-every 60 --eval-episodes 2 --log-every 10"
    code, out, error = run_script(module.main, *flags.split(), *small(module))
    assert code == 0, error
    folder = only_run(tmp_path / "out")
    saved = torch.load(folder / "policy.pt", weights_only=True)["parameters"]
    observations = torch.from_numpy(two_armed_arrays()["observations"])
    for name, expected in (("mean", observations.mean(0)), ("deviation", observations.std(0))):
        assert saved[name].shape == (6, 7)
        torch.testing.assert_close(saved[name], expected.expand(6, 7))
    assert not torch.equal(saved["output.weight"][0], saved["output.weight"][3])
    losses = [float(row["loss"]) for row in rows_of(folder) if row["stage"] == "bc" and row["loss"]]
    assert losses[-1] < losses[0]
    code, again, error = run_script(evaluate.main, folder, "--episodes", 2)
    assert code == 0, error
    assert again.splitlines()[-1] == out.splitlines()[-1]


def test_a_policy_that_cannot_be_loaded_fails_before_training(
    changed, two_armed, tmp_path, run_script, monkeypatch
):
    module = changed("mismatched", {'config["hidden_size"])': 'config["hidden_size"] + 1)'})
    monkeypatch.setattr(Run, "log", lambda *_: pytest.fail("it was trained"))
    flags = ["--data", two_armed, "--output-dir", tmp_path / "out", "--eval-episodes", 0]
    with pytest.raises(RuntimeError, match="size mismatch"):
        run_script(module.main, *flags, *small(module))


# --------------------------------------------------------------------- what is the same everywhere


def test_what_is_no_lesson_is_the_same_text_in_every_file():
    """A diff between two files shows the method: what they share does not differ."""
    everywhere = ("Policy", "log_prob", "load_policy")
    losses = ("segment_score", "masked_mean")
    shared = dict.fromkeys(IMITATION, everywhere)
    shared |= {
        unified_comparison: (*everywhere, *losses, "preference_loss"),
        binary_alignment: (
            *(*everywhere, *losses, "reference_point", "safety_probability"),
            *("constraint_violation", "class_weights"),
        ),
    }
    for module, names in shared.items():
        for name in names:
            ours, theirs = (inspect.getsource(getattr(x, name)) for x in (module, presa))
            assert ours == theirs, (module.__name__, name)
        if module in ALIGNMENT:
            ours, theirs = (inspect.getsource(x.main) for x in (module, presa))
            start, end = "    def draw(", "    # ---- stage two"
            block = ours[ours.index(start) : ours.index(end)]
            assert block in theirs, "the draws and the reference"
    names = ("init_parameters", "linear", "norm", "transformer", "cdt_loss", "pareto_front")
    for name in (*names, "augmented", "to_go", "within_limit"):
        ours, theirs = (inspect.getsource(getattr(x, name)) for x in (safe_rlhf_cdt, cdt))
        assert ours == theirs, name


def code_lines(module) -> list[str]:
    """Lines of code: without docstrings, help, comments and blank lines."""
    source = inspect.getsource(module)
    dropped = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            dropped |= set(range(node.lineno, node.end_lineno + 1))
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return [x.rstrip() for i, x in enumerate(lines, 1) if i not in dropped and x.strip()]


@pytest.mark.parametrize(
    ("one", "other", "most"),
    [
        (presa, binary_alignment, 50),
        (presa, unified_comparison, 75),  # some 45 of them are PreSa's safety term alone
        (bc_all, bc_safe, 40),
        (bc_safe, bc_safe_seg, 40),
    ],
    ids=["binary_alignment", "unified_comparison", "bc_safe", "bc_safe_seg"],
)
def test_a_diff_teaches(one, other, most):
    diff = unified_diff(code_lines(one), code_lines(other), n=0, lineterm="")
    changed = [x for x in diff if x[0] in "+-" and x[:3] not in ("+++", "---")]
    assert len(changed) <= most, "\n".join(changed)


@each_script
def test_a_script_is_one_file_and_every_flag_has_its_line_of_help(module):
    source = inspect.getsource(module)
    assert "algorithms." not in source and "from algorithms" not in source
    for args in module.Args.__mro__[:-1]:
        (body,) = (node.body for node in ast.parse(inspect.getsource(args)).body)
        for field, below in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                said = ast.literal_eval(below.value)
                assert len(said.split()) >= 4 and "\n" not in said, field.target.id


def test_the_same_flags_mean_the_same():
    """A flag that two methods share has one default; where it differs, that is on purpose."""
    fields = {}
    for module in ALL:
        for name, field in module.Args.__dataclass_fields__.items():
            fields.setdefault(name, {})[module] = field.default
    differ = {name for name, values in fields.items() if len(set(map(str, values.values()))) > 1}
    # Imitation has one stage, as long as both stages of alignment, at the rate of the first one,
    # and counts its batch in transitions. A transformer is another policy, trained for longer.
    assert differ == {"steps", "lr", "batch_size", "dropout", "eval_every"}
    for module, other in ((safe_rlhf_cdt, cdt), (binary_alignment, presa), (bc_safe, bc_all)):
        ours, theirs = (x.Args.__dataclass_fields__ for x in (module, other))
        for name in ours.keys() & theirs.keys():
            assert ours[name].default == theirs[name].default, name

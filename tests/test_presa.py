"""PreSa's mathematics against plain NumPy, and its training on a problem with a known answer."""

import csv
import math

import numpy as np
import pytest
import torch
from torch.func import functional_call

from algorithms import presa

PAIRS = 8


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def plain_presa_loss(score, label, weight, has_preference, nu, alpha, beta, delta, z_ref=None):
    """Eq. 15 in double-precision NumPy, one pair after the other; z_ref can be held fixed."""
    preference = [
        -math.log(sigmoid(alpha * (score[i, 0] - score[i, 1])))
        for i in range(len(score))
        if has_preference[i]
    ]
    z_ref = beta * score.mean() if z_ref is None else z_ref
    constraint = [
        weight[i, j] * (delta - sigmoid(label[i, j] * (beta * score[i, j] - z_ref)))
        for i in range(len(score))
        for j in range(2)
    ]
    return np.mean(preference) + nu * np.mean(constraint)


@pytest.fixture
def batch():
    rng = np.random.default_rng(3)
    score = rng.normal(0, 2, (PAIRS, 2))
    label = rng.choice([-1.0, 1.0], (PAIRS, 2))
    weight = rng.uniform(0.1, 2, (PAIRS, 2))
    has_preference = np.ones(PAIRS)
    has_preference[2] = 0
    return score, label, weight, has_preference


ARGS = presa.Args(alpha=0.7, beta=1.3, delta=0.9)


def tensors(*arrays):
    return tuple(torch.tensor(array) for array in arrays)


def torch_loss(score, label, weight, has_preference, nu=1.7, args=ARGS):
    nu = torch.tensor(nu, dtype=torch.float64)
    return presa.presa_loss(score, tensors(label, weight, has_preference), nu, args)


def test_loss_is_equation_15(batch):
    loss, metrics = torch_loss(torch.tensor(batch[0]), *batch[1:])
    expected = plain_presa_loss(*batch, nu=1.7, alpha=0.7, beta=1.3, delta=0.9)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    preference = plain_presa_loss(*batch, nu=0, alpha=0.7, beta=1.3, delta=0.9)
    assert metrics["preference_loss"].item() == pytest.approx(preference, rel=1e-12)
    assert metrics["violation"].item() == pytest.approx((expected - preference) / 1.7, rel=1e-9)


def test_segment_score_is_equation_7():
    rng = np.random.default_rng(0)
    log_prob, ref = rng.normal(size=(2, 3, 2, 5))
    expected = np.zeros((3, 2))
    for i in range(3):
        for j in range(2):
            for t in range(5):
                expected[i, j] += 0.9**t * (log_prob[i, j, t] - ref[i, j, t])
    score = presa.segment_score(*tensors(log_prob, ref), gamma=0.9)
    np.testing.assert_allclose(score, expected, rtol=1e-12)


def test_log_prob_is_negative_squared_distance():
    mean, action = tensors([[0.5, -1.0], [0.0, 0.25]], [[0.25, 1.0], [0.0, 0.25]])
    np.testing.assert_allclose(presa.log_prob(mean, action), [-(0.0625 + 4), 0])


def test_gradient_of_the_loss_by_finite_differences(batch):
    """With z_ref held fixed, as it is in the gradient."""
    score = torch.tensor(batch[0], requires_grad=True)
    torch_loss(score, *batch[1:])[0].backward()
    z_ref, step = 1.3 * batch[0].mean(), 1e-6
    numeric = np.zeros((PAIRS, 2))
    for i in range(PAIRS):
        for j in range(2):
            sides = []
            for sign in (1, -1):
                moved = batch[0].copy()
                moved[i, j] += sign * step
                sides.append(plain_presa_loss(moved, *batch[1:], 1.7, 0.7, 1.3, 0.9, z_ref))
            numeric[i, j] = (sides[0] - sides[1]) / (2 * step)
    np.testing.assert_allclose(score.grad, numeric, atol=1e-8)


def test_gradient_through_the_policy_by_finite_differences():
    torch.manual_seed(0)
    policy = presa.Policy(3, 2, 4).double()
    observation, action = torch.randn(6, 3).double(), torch.rand(6, 2).double() * 2 - 1
    names = [name for name, _ in policy.named_parameters()]

    def loss(*values):
        mean = functional_call(policy, dict(zip(names, values, strict=True)), (observation,))
        score = presa.log_prob(mean, action).view(1, 2, 3).sum(-1)
        return presa.preference_loss(score, torch.ones(1).double(), 0.5)

    assert torch.autograd.gradcheck(loss, tuple(policy.parameters()))


def test_z_ref_carries_no_gradient(batch):
    """Else moving all scores together would change nothing, and the gradients would sum to 0."""
    score = torch.tensor(batch[0], requires_grad=True)
    loss, metrics = torch_loss(score, *batch[1:])
    loss.backward()
    _, label, weight, _ = batch
    p = sigmoid(label * (1.3 * batch[0] - metrics["z_ref"].item()))
    expected = -1.7 * (weight * label * 1.3 * p * (1 - p)).mean()  # the preference terms cancel
    assert abs(expected) > 0.01
    assert score.grad.sum().item() == pytest.approx(expected, rel=1e-9)


def test_z_ref_is_not_clamped():
    score = torch.full((2, 2), -3.0, dtype=torch.float64)
    _, metrics = torch_loss(score, np.ones((2, 2)), np.ones((2, 2)), np.ones(2))
    assert metrics["z_ref"].item() == pytest.approx(-3.9)


def test_without_a_reference_point_the_score_itself_is_judged(batch):
    """--z-ref none: eq. 15 with z_ref = 0."""
    args = presa.Args(alpha=0.7, beta=1.3, delta=0.9, z_ref="none")
    loss, metrics = torch_loss(torch.tensor(batch[0]), *batch[1:], args=args)
    expected = plain_presa_loss(*batch, nu=1.7, alpha=0.7, beta=1.3, delta=0.9, z_ref=0.0)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["z_ref"] == 0


def test_pairs_left_out_count_for_nothing(batch):
    """Their label is 0: the loss is that of the other pairs, were they alone."""
    score, label, _, has_preference = batch
    out = np.arange(PAIRS) % 2 == 0
    label[out], has_preference[out] = 0, 0
    weight = presa.class_weights(torch.tensor(label), 0.1).numpy()
    assert (weight[out] == 0).all() and weight.mean() == pytest.approx(1)
    alone = [x[~out] for x in (score, label, weight, has_preference)]
    alone[2] = presa.class_weights(torch.tensor(alone[1]), 0.1).numpy()
    whole = torch_loss(torch.tensor(score), label, weight, has_preference)[1]
    part = torch_loss(torch.tensor(alone[0]), *alone[1:])[1]
    for name in whole:
        assert whole[name].item() == pytest.approx(part[name].item(), rel=1e-6, nan_ok=True)
    nothing = torch_loss(torch.tensor(score), label * 0, weight * 0, has_preference * 0)[0]
    assert nothing == 0, "a batch of nothing else has no loss, and no nan"


@pytest.mark.parametrize("term", ["preferred", "rejected", "safe", "unsafe"])
def test_sign_of_every_term(term):
    """Which way a descent step moves the score of a segment, whatever the other terms say."""
    score = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    if term in ("preferred", "rejected"):
        loss = presa.preference_loss(score, torch.ones(2), 0.1)
        moved = -torch.autograd.grad(loss, score)[0][:, 0 if term == "preferred" else 1]
        assert (moved > 0).all() if term == "preferred" else (moved < 0).all()
    else:
        label = torch.ones(2, 2) if term == "safe" else -torch.ones(2, 2)
        probability = presa.safety_probability(score, label, 1.0, torch.tensor(0.0))
        loss = presa.constraint_violation(probability, torch.ones(2, 2), 0.95)
        moved = -torch.autograd.grad(loss, score)[0]
        assert (moved > 0).all() if term == "safe" else (moved < 0).all()


def test_violation_is_positive_exactly_where_the_probability_is_too_low():
    weight = torch.ones(1, 2)
    assert presa.constraint_violation(torch.full((1, 2), 0.8), weight, 0.95) > 0
    assert presa.constraint_violation(torch.full((1, 2), 0.97), weight, 0.95) < 0


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0, 5.0])
def test_class_weights(eta):
    label = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]]).double()
    weight = presa.class_weights(label, eta)
    safe, unsafe = weight[label > 0], weight[label < 0]
    assert len(safe.unique()) == len(unsafe.unique()) == 1
    assert weight.mean().item() == pytest.approx(1)
    # lambda_u n_u / (lambda_s n_s) = eta: the way round that the docstring argues for
    assert (unsafe.sum() / safe.sum()).item() == pytest.approx(eta)


def test_class_weights_of_all_safe_feedback_are_zero():
    assert (presa.class_weights(torch.ones(5, 2), 0.1) == 0).all()


def test_pairs_without_a_preference_serve_the_safety_term_alone(batch):
    score, label, weight, _ = batch
    none = torch_loss(torch.tensor(score), label, weight, np.zeros(PAIRS))[1]
    assert none["preference_loss"] == 0
    assert none["violation"] == torch_loss(torch.tensor(score), *batch[1:])[1]["violation"]


def test_lemma_5_1_on_two_states():
    """Where the classes share no state, safe log-probabilities rise and unsafe ones fall.

    The reference is off on both, so there is room either way.
    """
    torch.manual_seed(0)
    policy = presa.Policy(2, 1, 32)
    observation = torch.eye(2).repeat_interleave(4, 0).view(2, 4, 2)  # [segment, L, state]
    action = torch.full((2, 4, 1), 0.6)
    label = torch.tensor([[1.0, -1.0]])
    weight = presa.class_weights(label, 1.0)
    with torch.no_grad():
        ref = presa.log_prob(policy(observation), action)
    assert (ref < -0.05).all()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    for _ in range(200):
        logp = presa.log_prob(policy(observation), action)
        score = presa.segment_score(logp, ref, 1.0)[None]  # [1, 2]
        probability = presa.safety_probability(score, label, 1.0, score.mean().detach())
        loss = presa.constraint_violation(probability, weight, 0.95)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    change = (presa.log_prob(policy(observation), action) - ref).sum(1)
    assert change[0] > 0.1
    assert change[1] < -0.1


def test_dropout_masks():
    def draw(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return presa.dropout_masks((2, 1000, 64), 0.25, generators)

    (mask,) = draw(0)
    assert mask.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (mask == 0).float().mean().item() == pytest.approx(0.25, abs=0.005)
    # independent per layer, sample and unit: neighbours agree as often as chance has it
    zero = mask == 0
    chance = 0.25**2 + 0.75**2
    for a, b in ((zero[0], zero[1]), (zero[:, 1:], zero[:, :-1]), (zero[..., 1:], zero[..., :-1])):
        assert (a == b).float().mean().item() == pytest.approx(chance, abs=0.01)
    # a seed's masks do not depend on the seeds beside it
    assert torch.equal(draw(1, 0)[1], mask)
    assert not torch.equal(draw(1, 0)[0], mask)
    assert torch.equal(presa.dropout_masks((3, 5), 0.0, [torch.Generator()]), torch.ones(1, 3, 5))


def test_load_policy_is_the_policy_without_dropout():
    torch.manual_seed(0)
    policy = presa.Policy(7, 2, 16)
    observation = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    act = presa.load_policy({}, policy.state_dict())
    np.testing.assert_allclose(act(observation), policy(torch.tensor(observation)).detach())


# ------------------------------------------------------------------------- training, end to end


@pytest.fixture
def train(two_armed, run_of):
    """Train on the two-armed data: rows of metrics.csv, results, the first run's mean action."""

    def run(*flags):
        small = "--num-pairs 500 --bc-steps 150 --steps 300 --hidden-size 32 --bc-lr 3e-3 --lr 3e-3"
        rows, results, saved = run_of(presa, two_armed, *small.split(), *flags)
        first = {name: p[0, 0] for name, p in saved["parameters"].items()}
        observation = np.random.default_rng(1).normal(size=(500, 7)).astype(np.float32)
        action = presa.load_policy({}, first)(observation).mean(0)
        return rows, results, action, saved

    return run


def test_training_goes_the_right_way(train):
    """Action 0 costs where positive, action 1 earns; behaviour is symmetric around 0."""
    one_limit = ("--cost-limits", "10")
    presa_action = train(*one_limit)[2]
    safety = train(*one_limit, "--objective", "safety")[2]
    preference = train(*one_limit, "--objective", "preference", "--alpha", "1")[2]
    flipped = train(
        *one_limit, "--objective", "preference", "--alpha", "1", "--preference-noise", "1"
    )[2]
    assert presa_action[0] < -0.1 and presa_action[1] > 0.1, "PreSa avoids what costs, and earns"
    assert safety[0] < -0.3 and abs(safety[1]) < 0.1, "the safety module avoids, and is blind to it"
    assert preference[1] > 0.25 and preference[0] > -0.05, "the preference module only earns"
    assert flipped[1] < -0.2, "and with every preference flipped does the opposite"


def test_multiplier_follows_the_violation(train):
    rows, results, _, _ = train("--cost-limits", "10", "--log-every", "1", "--steps", "400")
    rows = [row for row in rows if row["stage"] == "align"]
    nu = np.array([float(row["nu"]) for row in rows])
    violation = np.array([float(row["violation"]) for row in rows])
    expected = np.maximum(nu[:-1] + 0.05 * violation[:-1], 0)
    np.testing.assert_allclose(nu[1:], expected, atol=1e-5)
    assert violation[0] > 0 and nu[1] > nu[0] == 1, "violated at first, so it rises"
    assert (violation < 0).any() and (np.diff(nu) < 0).any(), "met later, so it falls"
    assert (nu >= 0).all()
    final = results["runs"][0]
    assert final["nu"] == pytest.approx(max(nu[-1] + 0.05 * violation[-1], 0), abs=1e-5)
    assert final["violation"] == pytest.approx(violation[-1], rel=1e-5)
    assert final["constraint_met"] == (violation[-1] <= 0)


def test_alignment_starts_at_the_reference(train):
    rows, _, _, _ = train("--cost-limits", "10", "--log-every", "1", "--dropout", "0")
    first = next(row for row in rows if row["stage"] == "align")
    for name in ("safe_score", "unsafe_score", "z_ref"):
        assert float(first[name]) == pytest.approx(0, abs=1e-4)
    assert float(first["preference_loss"]) == pytest.approx(math.log(2), abs=1e-4)


def test_all_safe_feedback_is_plain_preference_alignment(train):
    rows, results, action, _ = train("--cost-limits", "1000", "--objective", "presa")
    plain = train("--cost-limits", "1000", "--objective", "preference")[2]
    assert all(float(row["nu"]) == 0 for row in rows if row["stage"] == "align")
    assert results["runs"][0]["nu"] == 0
    np.testing.assert_array_equal(action, plain)


def test_runs_together_equal_runs_apart(train):
    """Seeds x limits along the run axis are the same runs as one at a time, without dropout."""
    few = ("--dropout", "0", "--steps", "50", "--log-every", "50")
    together = train("--seeds", "0", "1", "--cost-limits", "10", "60", *few)
    for s, seed in enumerate((0, 1)):
        for k, limit in enumerate((10, 60)):
            alone = train("--seeds", seed, "--cost-limits", limit, *few)
            for name, value in alone[3]["parameters"].items():
                torch.testing.assert_close(
                    together[3]["parameters"][name][s, k], value[0, 0], atol=2e-5, rtol=1e-3
                )
            mine = [
                r for r in together[0] if (r["seed"], r["cost_limit"]) == (str(seed), f"{limit}.0")
            ]
            for a, b in zip(mine, alone[0], strict=True):
                assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)


def test_a_seed_with_dropout_does_not_depend_on_its_company(train):
    few = ("--cost-limits", "10", "--steps", "20", "--bc-steps", "50")
    together = train("--seeds", "3", "1", *few)[3]["parameters"]
    alone = train("--seeds", "1", *few)[3]["parameters"]
    for name in alone:
        torch.testing.assert_close(together[name][1], alone[name][0], atol=2e-5, rtol=1e-3)


def test_same_seed_same_bits(train):
    first, second = train("--cost-limits", "10", "60"), train("--cost-limits", "10", "60")
    assert first[0] == second[0]
    for name, value in first[3]["parameters"].items():
        assert torch.equal(value, second[3]["parameters"][name])
    assert first[1]["runs"] == second[1]["runs"]


def test_a_loss_that_is_not_finite_stops_the_run(two_armed, tmp_path, run_script):
    flags = f"--data {two_armed} --output-dir {tmp_path}/out --eval-episodes 0 --device cpu "
    flags += "--num-pairs 50 --bc-steps 20 --steps 60 --lr 1e30 --log-every 10 --cost-limits 10"
    code, _, error = run_script(presa.main, *flags.split())
    assert code == 1
    assert "not finite at step 2" in error.splitlines()[-1]  # 21 is the first one of alignment
    (folder,) = (tmp_path / "out" / "presa" / "BallRun").iterdir()
    with open(folder / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)][:2] == ["10", "20"]
    assert not (folder / "results.json").exists() and not (folder / "policy.pt").exists()

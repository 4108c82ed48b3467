"""PreSa's mathematics against plain NumPy, and its training on a problem with a known answer."""

import math

from algorithms import presa
from tests.conftest import only_run, rows_of

import numpy as np
import pytest
import torch
from torch.func import functional_call

PAIRS = 8
WEIGHTS = {"alpha": 0.7, "beta": 1.3, "delta": 0.9}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def plain_presa_loss(score, label, weight, has_preference, nu, z_ref=None):
    """Eq. 15 in double-precision NumPy, one pair after the other; z_ref can be held fixed."""
    alpha, beta, delta = WEIGHTS.values()
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
    """The scores have a negative mean, which a reference point of 0 is not."""
    rng = np.random.default_rng(3)
    score = rng.normal(-1, 2, (PAIRS, 2))
    label = rng.choice([-1.0, 1.0], (PAIRS, 2))
    weight = rng.uniform(0.1, 2, (PAIRS, 2))
    has_preference = np.ones(PAIRS)
    has_preference[2] = 0
    return score, label, weight, has_preference


def torch_loss(score, label, weight, has_preference, z_ref="batch", **more):
    labels = tuple(torch.tensor(x) for x in (label, weight, has_preference))
    nu = torch.tensor(1.7, dtype=torch.float64)
    return presa.alignment_loss(score, labels, nu, **WEIGHTS, z_ref=z_ref, **more)


@pytest.mark.parametrize("z_ref", ["batch", "none"])
def test_loss_is_equation_15(batch, z_ref):
    fixed = None if z_ref == "batch" else 0.0
    loss, metrics = torch_loss(torch.tensor(batch[0]), *batch[1:], z_ref=z_ref)
    expected = plain_presa_loss(*batch, nu=1.7, z_ref=fixed)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    preference = plain_presa_loss(*batch, nu=0)
    assert metrics["preference_loss"].item() == pytest.approx(preference, rel=1e-12)
    assert metrics["violation"].item() == pytest.approx((expected - preference) / 1.7, rel=1e-9)
    alone, _ = torch_loss(torch.tensor(batch[0]), *batch[1:], z_ref=z_ref, preference_weight=0.0)
    assert alone.item() == pytest.approx(expected - preference, rel=1e-9)


def test_segment_score_is_equation_7():
    rng = np.random.default_rng(0)
    logp, ref = rng.normal(size=(2, 3, 2, 5))
    expected = np.zeros((3, 2))
    for i, j, t in np.ndindex(3, 2, 5):
        expected[i, j] += 0.9**t * (logp[i, j, t] - ref[i, j, t])
    score = presa.segment_score(torch.tensor(logp), torch.tensor(ref), gamma=0.9)
    np.testing.assert_allclose(score, expected, rtol=1e-12)


def test_gradient_of_the_loss_by_finite_differences(batch):
    """With z_ref held fixed, as it is in the gradient."""
    score = torch.tensor(batch[0], requires_grad=True)
    torch_loss(score, *batch[1:])[0].backward()
    z_ref, step = 1.3 * batch[0].mean(), 1e-6
    for i, j in np.ndindex(PAIRS, 2):
        moved = np.zeros((PAIRS, 2))
        moved[i, j] = step
        sides = [
            plain_presa_loss(batch[0] + x, *batch[1:], nu=1.7, z_ref=z_ref) for x in (moved, -moved)
        ]
        numeric = (sides[0] - sides[1]) / (2 * step)
        assert score.grad[i, j].item() == pytest.approx(numeric, abs=1e-8)


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


def test_the_policy_in_numpy():
    """Dropout's masks multiply the hidden units; without any it is what evaluation plays."""
    torch.manual_seed(0)
    policy = presa.Policy(7, 2, 16)
    p = {name: x.detach().numpy() for name, x in policy.state_dict().items()}
    rng = np.random.default_rng(0)
    observation = rng.normal(size=(5, 7)).astype(np.float32)
    masks = rng.choice([0, 4 / 3], (2, 5, 16)).astype(np.float32)

    def plain(masks):
        x = observation
        for layer, mask in zip(("hidden1", "hidden2"), masks, strict=True):
            x = np.maximum(x @ p[f"{layer}.weight"].T + p[f"{layer}.bias"], 0) * mask
        return np.tanh(x @ p["output.weight"].T + p["output.bias"])

    dropped = policy(torch.tensor(observation), torch.tensor(masks)).detach()
    np.testing.assert_allclose(dropped, plain(masks), rtol=1e-5, atol=1e-6)
    config = {"observation_dim": 7, "action_dim": 2, "hidden_size": 16}
    action = presa.load_policy(config, policy.state_dict())(observation)
    np.testing.assert_allclose(action, plain((1, 1)), rtol=1e-5, atol=1e-6)
    mean, told = torch.tensor([[0.5, -1.0], [0.0, 0.25]]), torch.tensor([[0.25, 1.0], [0.0, 0.25]])
    np.testing.assert_allclose(presa.log_prob(mean, told), [-(0.0625 + 4), 0])


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
    else:
        label = torch.ones(2, 2) if term == "safe" else -torch.ones(2, 2)
        probability = presa.safety_probability(score, label, 1.0, torch.tensor(0.0))
        loss = presa.constraint_violation(probability, torch.ones(2, 2), 0.95)
        moved = -torch.autograd.grad(loss, score)[0]
    assert (moved > 0).all() if term in ("preferred", "safe") else (moved < 0).all()


@pytest.mark.parametrize("eta", [0.1, 5.0])
def test_class_weights(eta):
    label = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]]).double()
    weight = presa.class_weights(label, eta)
    safe, unsafe = weight[label > 0], weight[label < 0]
    assert len(safe.unique()) == len(unsafe.unique()) == 1
    assert weight.mean().item() == pytest.approx(1)
    # lambda_u n_u / (lambda_s n_s) = eta: the way round that the docstring argues for
    assert (unsafe.sum() / safe.sum()).item() == pytest.approx(eta)
    torch.testing.assert_close(presa.class_weights(torch.ones(5, 2), eta), torch.ones(5, 2))


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
        z_ref = presa.reference_point(score, label, 1.0)
        probability = presa.safety_probability(score, label, 1.0, z_ref)
        loss = presa.constraint_violation(probability, weight, 0.95)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    change = (presa.log_prob(policy(observation), action) - ref).sum(1)
    assert change[0] > 0.1
    assert change[1] < -0.1


# ------------------------------------------------------------------------- training, end to end


@pytest.fixture
def train(two_armed, run_of):
    """Train on the two-armed data: rows of metrics.csv, results, the first run's mean action."""

    def run(*flags):
        small = "--num-pairs 500 --segment-length 20 --hidden-size 32 "
        small += "--bc-steps 150 --steps 300 --bc-lr 3e-3 --lr 6e-3"
        small += " --alpha 0.1 --delta 0.95"  # for segments as short as these
        rows, results, saved = run_of(presa, two_armed, *small.split(), *flags)
        first = {name: p[0] for name, p in saved["parameters"].items()}
        observation = np.random.default_rng(1).normal(size=(500, 7)).astype(np.float32)
        return rows, results, presa.load_policy(saved["config"], first)(observation).mean(0)

    return run


def test_training_goes_the_right_way(train):
    """Action 0 costs where positive, action 1 earns; behaviour is symmetric around 0."""
    one_limit = ("--cost-limits", "10")
    both = train(*one_limit, "--delta", "0.8")[2]
    safety = train(*one_limit, "--objective", "safety")[2]
    only = (*one_limit, "--objective", "preference", "--alpha", "1")
    preference, flipped = train(*only)[2], train(*only, "--preference-noise", "1")[2]
    assert both[0] < -0.1 and both[1] > 0.1, "PreSa avoids what costs, and earns"
    assert safety[0] < -0.3 and abs(safety[1]) < 0.1, "the safety module avoids, and is blind to it"
    assert preference[1] > 0.25 and preference[0] > -0.05, "the preference module only earns"
    assert flipped[1] < -0.2, "and with every preference flipped does the opposite"


def test_multiplier_follows_the_violation(train):
    flags = ("--cost-limits", "10", "--log-every", "1", "--steps", "400", "--dropout", "0")
    rows, results, _ = train(*flags)
    rows = [row for row in rows if row["stage"] == "align"]
    for name in ("safe_score", "unsafe_score", "z_ref"):
        assert float(rows[0][name]) == pytest.approx(0, abs=1e-4), "it starts at the reference"
    assert float(rows[0]["preference_loss"]) == pytest.approx(math.log(2), abs=1e-4)
    nu, violation = (np.array([float(row[x]) for row in rows]) for x in ("nu", "violation"))
    expected = np.maximum(nu[:-1] + 0.05 * violation[:-1], 0)
    np.testing.assert_allclose(nu[1:], expected, atol=1e-5)
    assert violation[0] > 0 and nu[1] > nu[0] == 1, "violated at first, so it rises"
    assert (violation < 0).any() and (np.diff(nu) < 0).any(), "met later, so it falls"
    assert (nu >= 0).all()
    final = results["runs"][0]
    assert final["nu"] == pytest.approx(max(nu[-1] + 0.05 * violation[-1], 0), abs=1e-5)
    assert final["violation"] == pytest.approx(violation[-1], rel=1e-5)


def test_where_all_are_safe_the_constraint_holds_the_policy_on_the_data(train):
    def end(*flags):
        rows, results, action = train("--cost-limits", "1000", *flags)
        scores = [float(row["safe_score"]) for row in rows if row["safe_score"]]
        return scores[-1], results["runs"][0]["nu"], action[1]

    score, nu, earns = end()
    loose_score, loose_nu, loosely_earns = end("--objective", "preference")
    assert nu > 1 and loose_nu == 0
    assert score > loose_score, "preferences alone leave the data further"
    assert earns > 0.1 and loosely_earns > 0.1


def test_what_the_loop_draws(train, monkeypatch):
    """Dropout's share and scale; a seed's runs share their batch and masks, and no two seeds do."""
    drawn, vmap = {}, torch.vmap

    def spy(function):
        def call(*inputs):
            drawn[function.__name__] = inputs
            return vmap(function)(*inputs)

        return call

    monkeypatch.setattr(torch, "vmap", spy)
    train("--seeds", 0, 1, "--cost-limits", 10, 60, "--bc-steps", 2, "--steps", 2)
    *_, index, bc_masks = drawn["bc_loss"]
    *_, pairs, masks = drawn["run_loss"]
    assert index.shape == (2, 512) and index.min() >= 0 and index.max() < 500 * 2 * 20
    assert pairs.shape == (4, 16) and masks.shape == (4, 2, 16 * 2 * 20, 32)
    for mask in (bc_masks, masks):
        assert mask.unique().tolist() == pytest.approx([0, 4 / 3])
        assert (mask == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
        chance = 0.25**2 + 0.75**2  # that two which know nothing of each other agree
        for a, b in (mask.unbind(1), (mask[0], mask[-1]), (mask[..., 1:], mask[..., :-1])):
            assert ((a == 0) == (b == 0)).float().mean().item() == pytest.approx(chance, abs=0.02)
    for x in (pairs, masks):
        assert torch.equal(x[0], x[1]) and torch.equal(x[2], x[3]) and not torch.equal(x[1], x[2])


def test_a_loss_that_is_not_finite_stops_the_run(two_armed, tmp_path, run_script):
    flags = f"--data {two_armed} --output-dir {tmp_path}/out --eval-episodes 0 --device cpu "
    flags += "--num-pairs 50 --bc-steps 20 --steps 60 --lr 1e30 --log-every 10 --cost-limits 10"
    code, _, error = run_script(presa.main, *flags.split())
    assert code == 1
    assert "not finite by step 30 (align)" in error.splitlines()[-1]
    folder = only_run(tmp_path / "out")
    assert [row["step"] for row in rows_of(folder)][:2] == ["10", "20"]
    assert not (folder / "results.json").exists() and not (folder / "policy.pt").exists()

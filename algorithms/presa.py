"""PreSa: offline safe policy optimization from human feedback, in one file.

    python algorithms/presa.py --task BallRun
    python algorithms/presa.py --task BallRun --seeds 0 1 2
    python algorithms/presa.py --task BallRun --objective preference   # or: safety (Figure 3)

Of two segments of behaviour people say which did better, of each segment whether it was safe. First
the policy imitates all segments and is frozen as the reference. Then it is aligned: it explains the
preferences (contrastive preference learning) under the constraint that, read as a classifier, it
tells safe segments from unsafe ones (a loss like KTO's); a Lagrange multiplier weighs the two:

    min_theta max_{nu >= 0}  E[-log sigmoid(alpha (Psi(s+) - Psi(s-)))]
                             + nu E[w(y) (delta - sigmoid(y (beta Psi(s) - z_ref)))]     (eq. 13-15)

    paper          here                    meaning
    sigma          segment                 L consecutive steps (s_t, a_t) of one episode
    sigma+/-       preferred, rejected     the two segments of a pair
    y              safe_label              +1 safe, -1 unsafe
    log pi(a|s)    log_prob                -|pi(s) - a|^2, a Gaussian of fixed variance (B.4)
    psi / beta     score, Psi above        sum_t gamma^t log pi(a_t|s_t) / pi_ref(a_t|s_t) (eq. 7)
    z_ref          z_ref                   reference point: the batch's mean of beta * score
    alpha, beta    alpha, beta             temperatures of preference and safety (eq. 3, 7)
    lambda_s/u, w  weight                  class weights (eq. 10), normalised to mean 1
    eta            eta                     relative importance of the two classes
    delta, nu      delta, nu               required probability; Lagrange multiplier
    kappa, T_max   cost_limit, horizon     behind the labels: safe iff cost <= kappa L / T_max

Where we depart from the paper's text, or it is silent:
- eta = lambda_u n_u / (lambda_s n_s). The text has the inverse, with which the paper's own eta =
  0.1 pushes away from unsafe segments ten times harder than it pulls to safe ones, and on BallRun
  the policy runs off (README; --eta 10 is that reading); read this way it does what the paper says.
- Equations 8 and 9 disagree (a mean over each class, or one over all segments). This is eq. 9.
- z_ref is not clamped at zero (as it is in KTO); segments all have one length (6.1: "varying").

Seeds x cost limits are trained at once: the code is written for one run, `torch.vmap` maps it over
all. A seed fixes initial weights, segments, batches and dropout masks; the limit only the labels.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.args import FeedbackArgs, GraphArgs, check_args
from common.cli import get_device, parse_args, run_main
from common.dataset import load_dataset
from common.dropout import dropout_masks
from common.feedback import get_feedback
from common.gpu import captured, log_sigmoid
from common.results import Run
from common.tasks import get_task


@dataclass
class Args(GraphArgs, FeedbackArgs):
    """PreSa: preferences under a safety constraint, by a Lagrangian."""

    # ---- objective
    objective: Literal["presa", "preference", "safety"] = "presa"
    """all of eq. 15, or one module alone (Figure 3): eq. 4 (nu = 0) or eq. 9 (nu = 1)"""
    alpha: float = 0.1
    """alpha, temperature of the preference (eq. 3; measured)"""
    beta: float = 1.0
    """beta, temperature of the safety score (eq. 7; paper, Table 12)"""
    gamma: float = 1.0
    """gamma, discount inside a segment (eq. 7; the paper's proof: close to 1)"""
    eta: float = 0.1
    """eta = lambda_u n_u / (lambda_s n_s), weight of unsafe over safe (eq. 10; paper, Table 13)"""
    delta: float = 0.95
    """delta, required weighted mean probability of the right label (eq. 13, 15; paper, Table 14)"""
    z_ref: Literal["batch", "none"] = "batch"
    """reference point of the score: the batch's mean, or 0 (Table 2)"""
    nu_init: float = 1.0
    """nu at the start, objective presa (ours)"""
    nu_lr: float = 5e-2
    """step size of nu's ascent, objective presa (measured)"""

    # ---- optimisation
    bc_steps: int = 1_500
    """steps of behaviour cloning, before alignment (ours)"""
    bc_lr: float = 1e-3
    """learning rate of behaviour cloning, Adam (ours)"""
    bc_batch_size: int = 512
    """transitions a step of behaviour cloning (ours)"""
    steps: int = 3_000
    """steps of alignment (measured)"""
    lr: float = 1e-3
    """learning rate of alignment, Adam (measured)"""
    batch_size: int = 16
    """pairs a step of alignment (measured)"""
    hidden_size: int = 256
    """units of each of the two hidden layers (paper, B.4)"""
    dropout: float = 0.25
    """probability, in 1/256, of dropping a hidden unit (B.4 names no value; ours)"""


class Policy(nn.Module):
    """Two hidden layers, ReLU, dropout; tanh onto the action box [-1, 1] (paper, B.4)."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_size: int):
        super().__init__()
        self.hidden1 = nn.Linear(observation_dim, hidden_size)
        self.hidden2 = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, action_dim)

    def forward(self, observation: Tensor, masks: Tensor | tuple = (1.0, 1.0)) -> Tensor:
        """[N, observation_dim], dropout masks [2, N, hidden_size] or none -> [N, action_dim]."""
        hidden = F.relu(self.hidden1(observation)) * masks[0]
        hidden = F.relu(self.hidden2(hidden)) * masks[1]
        return torch.tanh(self.output(hidden))


def log_prob(action_mean: Tensor, action: Tensor) -> Tensor:
    """log pi(a|s) = -|pi(s) - a|^2 up to a constant (B.4): [..., action_dim] twice -> [...]."""
    return -(action_mean - action).square().sum(-1)  # B.4


# ---------------------------------------------------------------------------------- the losses


def segment_score(log_prob: Tensor, ref_log_prob: Tensor, gamma: float) -> Tensor:
    """Psi(sigma) = sum_t gamma^t log pi/pi_ref, eq. 7 without beta: [..., L] twice -> [...]."""
    t = torch.arange(log_prob.shape[-1], dtype=log_prob.dtype, device=log_prob.device)
    return (gamma**t * (log_prob - ref_log_prob)).sum(-1)  # eq. 7


def preference_loss(score: Tensor, has_preference: Tensor, alpha: float) -> Tensor:
    """Contrastive preference loss, eq. 2-4, over the pairs that have a preference -> scalar.

    score is [B, 2], of preferred and rejected; has_preference [B], 1 or 0.
    """
    preferred, rejected = (alpha * score).unbind(1)  # eq. 3, summed over the segment
    loss = -log_sigmoid(preferred - rejected)  # eq. 2, 4
    return (has_preference * loss).sum() / has_preference.sum().clamp(min=1)


def safety_probability(score: Tensor, safe_label: Tensor, beta: float, z_ref: Tensor) -> Tensor:
    """p(Y = y | sigma) = sigmoid(y (beta Psi - z_ref)), eq. 11: [B, 2] twice -> [B, 2]."""
    utility = beta * score - z_ref  # eq. 6
    return torch.sigmoid(safe_label * utility)  # eq. 11


def constraint_violation(probability: Tensor, weight: Tensor, delta: float) -> Tensor:
    """E[w (delta - p)], met where <= 0; its gradient is eq. 9's: [B, 2] twice -> scalar."""
    return (weight * (delta - probability)).mean()  # eq. 9, 15


def class_weights(safe_label: Tensor, eta: float) -> Tensor:
    """w(y): lambda_u n_u / (lambda_s n_s) = eta, and a mean of 1 over all segments -> [P, 2].

    safe_label is [P, 2], +1 or -1, at least one +1; 0, of a pair left out, counts for nothing.
    Where all are safe the safety term has nothing to say and every weight is 0.
    """
    safe, unsafe = (safe_label > 0).float(), (safe_label < 0).float()
    n_safe, n_unsafe, n = safe.sum(), unsafe.sum(), safe_label.numel()
    lambda_safe = n / ((1 + eta) * n_safe)  # eq. 10
    lambda_unsafe = eta * n / ((1 + eta) * n_unsafe.clamp(min=1))  # eq. 10
    return (lambda_safe * safe + lambda_unsafe * unsafe) * (n_unsafe > 0)


def presa_loss(
    score: Tensor, labels: tuple[Tensor, Tensor, Tensor], nu: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 15 for one run: the Lagrangian of a batch, and what to log of it, all scalars.

    score is [B, 2], of preferred and rejected; labels are safe_label [B, 2] (+1, -1; 0: left out),
    weight [B, 2], has_preference [B] (0: the pair serves the safety term alone); nu is a scalar.
    """
    safe_label, weight, has_preference = labels
    preference = preference_loss(score, has_preference, args.alpha)
    known = safe_label.abs()  # no gradient through z_ref, and no clamp at zero (below eq. 7)
    z_ref = args.beta * (score.detach() * known).mean() / known.mean().clamp(min=1e-6)  # eq. 7
    z_ref = z_ref if args.z_ref == "batch" else torch.zeros_like(z_ref)
    probability = safety_probability(score, safe_label, args.beta, z_ref)
    violation = constraint_violation(probability, weight, args.delta)
    loss = (args.objective != "safety") * preference + nu * violation  # eq. 15

    safe, unsafe = (safe_label > 0).float(), (safe_label < 0).float()
    preferred, rejected = score.unbind(1)
    right = (preferred > rejected).float()
    metrics = {
        "loss": loss,
        "preference_loss": preference,
        "violation": violation,
        "nu": nu.clone(),
        "weighted_probability": (weight * probability).mean(),
        "z_ref": z_ref,
        "safe_score": masked_mean(score, safe),
        "unsafe_score": masked_mean(score, unsafe),
        "preference_accuracy": masked_mean(right, has_preference),
        "preference_accuracy_safe": masked_mean(right, safe.prod(1) * has_preference),
    }
    return loss, {name: x.detach() for name, x in metrics.items()}


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` where ``mask`` is 1; nan where it nowhere is."""
    return (x * mask).sum() / mask.sum()


def main() -> None:
    args = parse_args(Args)
    check_args(args, shares=("delta",))

    # ---- setup: nothing is written before all input is checked
    task = get_task(args.task, args.env_id)
    device = get_device(args.device)
    dataset = load_dataset(task, args.data)
    feedback = get_feedback(dataset, task, args)
    starts, safe_label, has_preference = feedback.tensors(device)  # of a pair the preferred first
    limits, num_pairs, length = feedback.cost_limits, starts.shape[1], feedback.segment_length
    weight = torch.vmap(torch.vmap(lambda y: class_weights(y, args.eta)))(safe_label)  # [S,K,P,2]
    observations = torch.from_numpy(dataset.observations).to(device)
    actions = torch.from_numpy(dataset.actions).to(device)
    run = Run(args, __file__, task, dataset, limits, args.bc_steps + args.steps, feedback)
    policies, generators = [], []
    for seed in args.seeds:
        torch.manual_seed(seed)
        sizes = (observations.shape[1], actions.shape[1], args.hidden_size)
        policies.append(Policy(*sizes).to(device))
        generators.append(torch.Generator(device).manual_seed(seed))
    policy, (parameters, _) = policies[0], stack_module_state(policies)  # each [S, ...]

    def draw(high: int, size: int, rows: int) -> tuple[Tensor, Tensor]:
        """Random indices [S, size] and dropout masks [S, 2, rows, hidden_size]."""
        index = [torch.randint(high, (size,), generator=g, device=device) for g in generators]
        masks = dropout_masks((2, rows, args.hidden_size), args.dropout, generators)
        return torch.stack(index), masks

    # ---- stage one: the reference, behaviour cloning on the transitions of all segments
    def bc_loss(parameters, starts, drawn, masks):
        """E |pi(s) - a|^2 for one seed; ``drawn`` counts through all steps of all segments."""
        steps = starts.flatten()[drawn // length] + drawn % length  # [B]
        mean = functional_call(policy, parameters, (observations[steps], masks))
        return -log_prob(mean, actions[steps]).mean()

    optimizer = torch.optim.Adam(parameters.values(), lr=args.bc_lr, fused=True)
    for step in run.steps("bc", 1, args.bc_steps, parameters, generators, optimizer=optimizer):
        batch = draw(num_pairs * 2 * length, args.bc_batch_size, args.bc_batch_size)
        loss = torch.vmap(bc_loss)(parameters, starts, *batch)  # [S]
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        run.log("bc", step, {"loss": loss.detach()})
        run.evaluate("bc", step, {name: p[:, None] for name, p in parameters.items()})

    def reference_log_prob(parameters):
        """log pi_ref(a|s) of all transitions, [N]: it never changes, so it is computed once."""
        chunks = zip(observations.split(8192), actions.split(8192), strict=True)
        return torch.cat([log_prob(functional_call(policy, parameters, s), a) for s, a in chunks])

    with torch.no_grad():
        ref_log_prob = torch.vmap(reference_log_prob)(parameters)  # [S, N]

    # ---- stage two: the Lagrangian; a policy and a multiplier for each seed and limit
    def run_loss(parameters, nu, labels, shared):
        """Eq. 15 of one run, on the batch of pairs drawn for its seed."""
        starts, ref_log_prob, pairs, masks = shared
        steps = starts[pairs][..., None] + torch.arange(length, device=device)  # [B, 2, L]
        mean = functional_call(policy, parameters, (observations[steps].flatten(0, 2), masks))
        logp = log_prob(mean, actions[steps].flatten(0, 2)).view(steps.shape)
        score = segment_score(logp, ref_log_prob[steps], args.gamma)
        return presa_loss(score, tuple(x[pairs] for x in labels), nu, args)

    # The runs of one seed share all but parameters, nu and labels: the inner map's None.
    all_runs = torch.vmap(torch.vmap(run_loss, in_dims=(0, 0, 0, None)))
    parameters = {
        name: p.detach()[:, None].repeat_interleave(len(limits), 1).requires_grad_()
        for name, p in parameters.items()
    }  # [S, K, ...]
    modules = {"presa": (args.nu_init, args.nu_lr), "preference": (0.0, 0.0), "safety": (1.0, 0.0)}
    nu_init, nu_lr = modules[args.objective]
    nu = nu_init * (weight.sum((2, 3)) > 0)  # [S, K]; 0 where all segments are safe
    optimizer = torch.optim.Adam(parameters.values(), lr=args.lr, fused=True)

    def align() -> dict[str, Tensor]:
        """A step of alignment, from the draw of pairs to nu; what to log of it."""
        # 1. draw a batch of pairs for each seed
        batch = draw(num_pairs, args.batch_size, args.batch_size * 2 * length)
        # 2. the Lagrangian of every run, eq. 15
        labels, shared = (safe_label, weight, has_preference), (starts, ref_log_prob, *batch)
        loss, metrics = all_runs(parameters, nu, labels, shared)  # [S, K] each
        # 3. theta descends
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        # 4. nu ascends, and stays non-negative
        nu.copy_((nu + nu_lr * metrics["violation"]).clamp(min=0))  # eq. 14
        return metrics

    align = captured(align, optimizer, generators, args.cudagraphs)
    others = {"optimizer": optimizer, "nu": nu}
    first, last = args.bc_steps + 1, args.bc_steps + args.steps
    for step in run.steps("align", first, last, parameters, generators, **others):
        run.log("align", step, align())
        run.evaluate("align", step, parameters)
    final = {"nu": nu, "constraint_met": run.last["violation"] <= 0}  # the last row's mean
    run.finish(parameters, final, stage_ends=args.bc_steps)


def load_policy(config: dict, parameters: dict[str, Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """Rebuild one policy for evaluation: observations [n, .] -> actions [n, .], dropout off."""
    hidden, output = parameters["hidden1.weight"], parameters["output.weight"]
    policy = Policy(hidden.shape[1], output.shape[0], hidden.shape[0])
    policy.load_state_dict(parameters)
    return lambda observations: policy(torch.from_numpy(observations)).detach().numpy()


if __name__ == "__main__":
    run_main(main)

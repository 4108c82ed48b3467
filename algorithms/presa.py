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
    y              safe_label              +1 safe, -1 unsafe; 0: nobody can tell
    log pi(a|s)    log_prob                -|pi(s) - a|^2, a Gaussian of fixed variance (B.4)
    psi / beta     score, Psi above        sum_t gamma^t log pi(a_t|s_t) / pi_ref(a_t|s_t) (eq. 7)
    z_ref          z_ref                   reference point: 0, or the batch's mean of beta * score
    alpha, beta    alpha, beta             temperatures of preference and safety (eq. 3, 7)
    lambda_s/u, w  weight                  class weights (eq. 10), normalised to mean 1
    eta            eta                     relative importance of the two classes
    delta, nu      delta, nu               required probability; Lagrange multiplier
    kappa, T_max   cost_limit, horizon     behind the labels: safe iff cost <= kappa L / T_max

Where we depart from the paper's text, or it is silent:
- eta = lambda_u n_u / (lambda_s n_s). The text has the inverse, with which the paper's own eta =
  0.1 pushes away from unsafe segments ten times harder than it pulls to safe ones, and on BallRun
  the policy runs off (--eta 10 is that reading); read this way it does what the paper says.
- Equations 8 and 9 disagree (a mean over each class, or one over all segments). This is eq. 9.
- z_ref is 0 (--z-ref batch is the paper's). Most segments are unsafe, so their mean lies far below
  the safe ones, which then pull no more, and all scores fall together. KTO clamps the mean at 0;
  here, where it is negative, that would make it 0.
- Segments are whole episodes. Psi adds up L steps, so alpha and beta are, by default,
  6 and 20 divided by L.

R = seeds x cost limits are trained at once: the code is written for one run, `torch.vmap` maps it
over all. A seed fixes initial weights, segments, batches and dropout; the limit only the labels.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.args import FeedbackArgs, OutputArgs, get_device, parse_args, run_main
from common.dataset import load_dataset
from common.feedback import get_feedback
from common.results import Run
from common.tasks import get_task

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state


@dataclass
class Args(OutputArgs, FeedbackArgs):
    """PreSa: preferences under a safety constraint, by a Lagrangian."""

    # ---- objective
    objective: Literal["presa", "preference", "safety"] = "presa"
    """all of eq. 15, or one module alone (Figure 3): eq. 4 (nu = 0) or eq. 9 (nu = 1)"""
    alpha: float | None = None
    """alpha, temperature of the preference (eq. 3); default: 6 / steps of a segment (measured)"""
    beta: float | None = None
    """beta, temperature of the safety score (eq. 7; Table 12: 1); default: 20 / steps (measured)"""
    gamma: float = 1.0
    """gamma, discount inside a segment (eq. 7; the paper's proof: close to 1)"""
    eta: float = 0.1
    """eta = lambda_u n_u / (lambda_s n_s), weight of unsafe over safe (eq. 10; paper, Table 13)"""
    delta: float = 0.8
    """delta, required weighted probability of the right label (eq. 13; measured; Table 14: 0.95)"""
    z_ref: Literal["none", "batch"] = "none"
    """reference point of the score: 0 (measured), or the batch's mean (paper, Table 2)"""
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
    steps: int = 1_000
    """steps of alignment (measured)"""
    lr: float = 3e-3
    """learning rate of alignment, Adam, at its highest, after a tenth of the steps (measured)"""
    batch_size: int = 16
    """pairs a step of alignment (measured)"""
    hidden_size: int = 256
    """units of each of the two hidden layers (paper, B.4)"""
    dropout: float = 0.25
    """probability of dropping a hidden unit, of pi and not of pi_ref (B.4 names no value; ours)"""


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
    """log pi(a|s) = -|pi(s) - a|^2 (B.4): [..., action_dim] twice -> [...].

    The Gaussian's constant is left out: it cancels in every log pi/pi_ref.
    """
    return -(action_mean - action).square().sum(-1)  # B.4


# ---------------------------------------------------------------------------------- the losses


def segment_score(logp: Tensor, ref_logp: Tensor, gamma: float) -> Tensor:
    """Psi(sigma) = sum_t gamma^t log pi/pi_ref, eq. 7 without beta: [..., L] twice -> [...]."""
    t = torch.arange(logp.shape[-1], dtype=logp.dtype, device=logp.device)
    return (gamma**t * (logp - ref_logp)).sum(-1)  # eq. 7


def preference_loss(score: Tensor, has_preference: Tensor, alpha: float) -> Tensor:
    """Contrastive preference loss, eq. 2-4, over the pairs that have a preference -> scalar.

    score is [B, 2], of preferred and rejected; has_preference [B], 1 or 0.
    """
    preferred, rejected = (alpha * score).unbind(1)  # eq. 3, summed over the segment
    loss = F.softplus(rejected - preferred)  # eq. 2, 4: -log sigmoid(preferred - rejected)
    return (has_preference * loss).sum() / has_preference.sum().clamp(min=1)


def reference_point(score: Tensor, safe_label: Tensor, beta: float) -> Tensor:
    """z_ref: mean of beta * Psi over the segments that have a label, [B, 2] twice -> scalar.

    It says where the scores lie by now. With a gradient, all scores could fall together at no loss.
    """
    has_label = safe_label.abs()  # 0 where nobody can tell, or the pair is left out
    return beta * (score.detach() * has_label).sum() / has_label.sum().clamp(min=1)  # eq. 7


def safety_probability(score: Tensor, safe_label: Tensor, beta: float, z_ref: Tensor) -> Tensor:
    """p(Y = y | sigma) = sigmoid(y (beta Psi - z_ref)), eq. 11: [B, 2] twice -> [B, 2]."""
    utility = beta * score - z_ref  # eq. 6
    return torch.sigmoid(safe_label * utility)  # eq. 11


def constraint_violation(probability: Tensor, weight: Tensor, delta: float) -> Tensor:
    """E[w (delta - p)], met where <= 0; its gradient is eq. 9's: [B, 2] twice -> scalar."""
    return (weight * (delta - probability)).mean()  # eq. 9, 15


def class_weights(safe_label: Tensor, eta: float) -> Tensor:
    """w(y): lambda_u n_u / (lambda_s n_s) = eta, and a mean of 1 over all segments -> [P, 2].

    safe_label is [P, 2], at least one +1; what is left out counts for nothing. Where all are safe,
    all weigh the same.
    """
    safe, unsafe = (safe_label > 0).float(), (safe_label < 0).float()
    weight = safe / safe.sum() + eta * unsafe / unsafe.sum().clamp(min=1)  # eq. 10
    return weight / weight.mean()


def alignment_loss(
    score: Tensor,
    labels: tuple[Tensor, Tensor, Tensor],
    nu: Tensor,
    alpha: float,
    beta: float,
    delta: float,
    z_ref: str = "none",
    preference_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 15 for one run: the Lagrangian of a batch, and what to log of it, all scalars.

    score is [B, 2], of preferred and rejected; labels are safe_label [B, 2], weight [B, 2] and
    has_preference [B] (0: the pair serves the safety term alone); nu is a scalar.
    """
    safe_label, weight, has_preference = labels
    preference = preference_loss(score, has_preference, alpha)
    point = reference_point(score, safe_label, beta) if z_ref == "batch" else score.new_zeros(())
    probability = safety_probability(score, safe_label, beta, point)
    violation = constraint_violation(probability, weight, delta)
    loss = preference_weight * preference + nu * violation  # eq. 15

    safe, unsafe = (safe_label > 0).float(), (safe_label < 0).float()
    right = (score[:, 0] > score[:, 1]).float()
    metrics = {
        "nu": nu.clone(),
        "loss": loss,
        "preference_loss": preference,
        "violation": violation,
        "weighted_probability": (weight * probability).mean(),  # weights have mean 1 over all pairs
        "z_ref": point,
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
    args = parse_args(Args, shares=("delta",))

    # ---- setup: nothing is written before all input is checked
    task = get_task(args.task, args.env_id)
    device = get_device(args.device)
    dataset = load_dataset(task, args.data)
    feedback = get_feedback(dataset, task, args)
    segments, safe_label, has_preference = feedback.tensors(device)  # of a pair the preferred first
    weight = torch.vmap(lambda label: class_weights(label, args.eta))(safe_label)  # [R, P, 2]
    observations = torch.from_numpy(dataset.observations).to(device)
    actions = torch.from_numpy(dataset.actions).to(device)
    policies, generators = [], []
    for seed in args.seeds:
        torch.manual_seed(seed)
        sizes = (task.observation_dim, task.action_dim, args.hidden_size)
        policies.append(Policy(*sizes).to(device))
        generators.append(torch.Generator(device).manual_seed(seed))
    policy = policies[0]
    parameters, buffers = stack_module_state(policies)
    reference = {**parameters, **buffers}  # [S, ...] each
    last, limits = args.bc_steps + args.steps, feedback.cost_limits
    shown = {
        "nu": "Lagrange multiplier of the constraint on the labels",
        "violation": "what the mean probability of the right label lacks of delta, in training",
    }
    run = Run(args, __file__, task, dataset, limits, last, feedback, shown=shown)
    load_policy(run.config, {name: x[0] for name, x in reference.items()})  # as evaluation will

    def draw(high: int, size: int, rows: int) -> tuple[Tensor, Tensor]:
        """For each seed: random indices [S, size], dropout masks [S, 2, rows, hidden_size]."""
        index = [torch.randint(high, (size,), generator=g, device=device) for g in generators]
        shape = (2, rows, args.hidden_size)
        uniform = torch.stack([torch.rand(shape, generator=g, device=device) for g in generators])
        return torch.stack(index), uniform.ge_(args.dropout).div_(1 - args.dropout)

    # ---- stage one: the reference, behaviour cloning on the transitions of all segments
    transitions = segments.flatten(1)  # [S, P * 2 * L]

    def bc_loss(parameters, transitions, index, masks):
        """E |pi(s) - a|^2 of one seed, on a batch of its transitions."""
        batch = transitions[index]  # [B]
        mean = functional_call(policy, parameters, (observations[batch], masks))
        return -log_prob(mean, actions[batch]).mean()

    optimizer = torch.optim.Adam(parameters.values(), lr=args.bc_lr, fused=True)
    training = {"policies": reference, "optimizer": optimizer, "generators": generators}
    for step in range(run.restore("bc", training) + 1, args.bc_steps + 1):
        index, masks = draw(transitions.shape[1], args.bc_batch_size, args.bc_batch_size)
        loss = torch.vmap(bc_loss)(reference, transitions, index, masks)  # [S]
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        run.log("bc", step, {"loss": loss.detach()})
        if step % args.eval_every == 0 or step == args.bc_steps:
            run.evaluate("bc", step, reference)
        if step % args.checkpoint_every == 0 or step == args.bc_steps:
            run.save("bc", step, training)

    def reference_logp(parameters):
        """log pi_ref(a|s) of all transitions, [N], dropout off: computed once, it never changes."""
        chunks = zip(observations.split(8192), actions.split(8192), strict=True)
        return torch.cat([log_prob(functional_call(policy, parameters, s), a) for s, a in chunks])

    with torch.no_grad():
        ref_logp = torch.vmap(reference_logp)(reference)  # [S, N]

    # ---- stage two: the Lagrangian; a policy and a multiplier for each of R = S x K runs
    seed_of = torch.arange(len(args.seeds), device=device).repeat_interleave(len(limits))  # [R]
    aligned = {
        name: x.detach()[seed_of].requires_grad_(x.requires_grad) for name, x in reference.items()
    }
    modules = {"presa": (args.nu_init, args.nu_lr), "preference": (0.0, 0.0), "safety": (1.0, 0.0)}
    nu_init, nu_lr = modules[args.objective]
    nu = torch.full((len(weight),), nu_init, device=device)  # [R]
    pref_weight = 0.0 if args.objective == "safety" else 1.0
    length = segments.shape[-1]
    alpha = 6 / length if args.alpha is None else args.alpha  # a score adds up L steps
    beta = 20 / length if args.beta is None else args.beta
    rows = args.batch_size * 2 * length  # transitions in a batch

    def run_loss(parameters, nu, labels, seed, pairs, masks):
        """Eq. 15 of one run, on the batch of pairs drawn for its seed."""
        batch = segments[seed, pairs]  # [B, 2, L]
        mean = functional_call(policy, parameters, (observations[batch].flatten(0, 2), masks))
        logp = log_prob(mean, actions[batch].flatten(0, 2)).view(batch.shape)
        score = segment_score(logp, ref_logp[seed, batch], args.gamma)
        labels = tuple(x[pairs] for x in labels)
        return alignment_loss(score, labels, nu, alpha, beta, args.delta, args.z_ref, pref_weight)

    optimizer = torch.optim.Adam(
        [x for x in aligned.values() if x.requires_grad], lr=args.lr, fused=True
    )
    training = {"policies": aligned, "optimizer": optimizer, "generators": generators, "nu": nu}
    for step in range(run.restore("align", training, args.bc_steps) + 1, last + 1):
        # 1. draw a batch of pairs for each seed; its runs share it
        pairs, masks = (x[seed_of] for x in draw(segments.shape[1], args.batch_size, rows))
        # 2. the Lagrangian of every run, eq. 15
        labels = (safe_label, weight, has_preference)
        loss, metrics = torch.vmap(run_loss)(aligned, nu, labels, seed_of, pairs, masks)  # [R] each
        # 3. theta descends, by steps that grow for the first tenth and then shrink to 0
        done = (step - args.bc_steps) / args.steps
        optimizer.param_groups[0]["lr"] = args.lr * min(done / 0.1, (1 - done) / 0.9)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        # 4. nu ascends, and stays non-negative
        nu.copy_((nu + nu_lr * metrics["violation"]).clamp(min=0))  # eq. 14
        # 5. log, evaluate, save
        run.log("align", step, metrics)
        if step % args.eval_every == 0:
            run.evaluate("align", step, aligned)
        if step % args.checkpoint_every == 0:
            run.save("align", step, training)
    run.finish(aligned, {"nu": nu}, stage_ends=args.bc_steps, reference=reference)


def load_policy(config: dict, parameters: dict[str, Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """Rebuild one policy for evaluation: observations [n, .] -> actions [n, .], dropout off."""
    policy = Policy(config["observation_dim"], config["action_dim"], config["hidden_size"])
    policy.load_state_dict(parameters)
    return lambda observations: policy(torch.from_numpy(observations)).detach().numpy()


if __name__ == "__main__":
    run_main(main)

"""Unified Comparison: one preference for safe and good at once, in one file.

    python algorithms/unified_comparison.py --task BallRun
    python algorithms/unified_comparison.py --task BallRun --seeds 0 1 2

It sees PreSa's feedback and merges it: a safe segment is preferred to an unsafe one, whichever did
better; of two safe or two unsafe ones the better is. First the policy imitates all segments and is
frozen as the reference; then it explains these preferences (contrastive preference learning, as in
PreSa's preference term):

    min_theta  E[-log sigmoid(alpha (Psi(s+) - Psi(s-)))]                                (eq. 2-4)

    paper          here                    meaning
    sigma          segment                 L consecutive steps (s_t, a_t) of one episode
    sigma+/-       preferred, rejected     the two segments of a pair, after merging
                   direction               +1 where the one that did better is sigma+, -1 where
                                           safety turns the pair round, 0 where nobody can say
    log pi(a|s)    log_prob                -|pi(s) - a|^2, a Gaussian of fixed variance (B.4)
    psi / beta     score, Psi above        sum_t gamma^t log pi(a_t|s_t) / pi_ref(a_t|s_t) (eq. 7)
    alpha          alpha                   temperature (eq. 3)
    kappa, T_max   cost_limit, horizon     behind the labels: safe iff cost <= kappa L / T_max

A pair without a preference serves where its labels differ. The paper has this method in Table 8.

Seeds x cost limits are trained at once: the code is written for one run, `torch.vmap` maps it over
all. A seed fixes initial weights, segments, batches and dropout masks; the limit only the labels.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.args import FeedbackArgs, GraphArgs, check_args
from common.cli import UserError, get_device, parse_args, run_main
from common.dataset import load_dataset
from common.dropout import dropout_masks
from common.feedback import get_feedback
from common.gpu import captured, log_sigmoid
from common.results import Run
from common.tasks import get_task


@dataclass
class Args(GraphArgs, FeedbackArgs):
    """Unified Comparison: safe before unsafe, then better before worse, as one preference."""

    # ---- objective
    alpha: float = 0.1
    """alpha, temperature of the preference (eq. 3; ours: PreSa's)"""
    gamma: float = 1.0
    """gamma, discount inside a segment (eq. 7; the paper's proof: close to 1)"""

    # ---- optimisation
    bc_steps: int = 1_500
    """steps of behaviour cloning, before alignment (ours)"""
    bc_lr: float = 1e-3
    """learning rate of behaviour cloning, Adam (ours)"""
    bc_batch_size: int = 512
    """transitions a step of behaviour cloning (ours)"""
    steps: int = 3_000
    """steps of alignment (ours: PreSa's)"""
    lr: float = 1e-3
    """learning rate of alignment, Adam (ours: PreSa's)"""
    batch_size: int = 16
    """pairs a step of alignment (ours: PreSa's)"""
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


def segment_score(log_prob: Tensor, ref_log_prob: Tensor, gamma: float) -> Tensor:
    """Psi(sigma) = sum_t gamma^t log pi/pi_ref, eq. 7 without beta: [..., L] twice -> [...]."""
    t = torch.arange(log_prob.shape[-1], dtype=log_prob.dtype, device=log_prob.device)
    return (gamma**t * (log_prob - ref_log_prob)).sum(-1)  # eq. 7


def unified_direction(safe_label: Tensor, has_preference: Tensor) -> Tensor:
    """+1: the first segment of a pair is preferred, -1: the second, 0: neither -> [...].

    safe_label is [..., 2] (+1, -1; 0: left out), of each pair the segment that did better first;
    has_preference [...] is 0 where nobody said which did better.
    """
    difference = (safe_label[..., 0] - safe_label[..., 1]) / 2  # +1, -1, or 0 where they are alike
    return torch.where(difference == 0, has_preference, difference)


def preference_loss(
    score: Tensor, direction: Tensor, alpha: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Contrastive preference loss, eq. 2-4, for one run: of a batch, and what to log, all scalars.

    score is [B, 2], of both segments; direction [B] is +1, -1, or 0 of a pair that is left out.
    """
    first, second = (alpha * score).unbind(1)  # eq. 3, summed over the segment
    margin = direction * (first - second)
    known = direction.abs()
    loss = -(known * log_sigmoid(margin)).sum() / known.sum().clamp(min=1)  # eq. 2, 4
    metrics = {
        "loss": loss,
        "preference_accuracy": masked_mean((margin > 0).float(), known),
        "margin": masked_mean(margin, known),
    }
    return loss, {name: x.detach() for name, x in metrics.items()}


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` where ``mask`` is 1; nan where it nowhere is."""
    return (x * mask).sum() / mask.sum()


def main() -> None:
    args = parse_args(Args)
    check_args(args)

    # ---- setup: nothing is written before all input is checked
    task = get_task(args.task, args.env_id)
    device = get_device(args.device)
    dataset = load_dataset(task, args.data)
    feedback = get_feedback(dataset, task, args)
    starts, safe_label, has_preference = feedback.tensors(device)  # of a pair the preferred first
    limits, num_pairs, length = feedback.cost_limits, starts.shape[1], feedback.segment_length
    direction = unified_direction(safe_label, has_preference)  # [S, K, P]
    if not direction.any(-1).all():
        raise UserError(f"--feedback {args.feedback}: at a limit no pair prefers either segment")
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

    # ---- stage two: alignment, a policy for each seed and limit
    def run_loss(parameters, direction, shared):
        """Eq. 4 of one run, on the batch of pairs drawn for its seed."""
        starts, ref_log_prob, pairs, masks = shared
        steps = starts[pairs][..., None] + torch.arange(length, device=device)  # [B, 2, L]
        mean = functional_call(policy, parameters, (observations[steps].flatten(0, 2), masks))
        logp = log_prob(mean, actions[steps].flatten(0, 2)).view(steps.shape)
        score = segment_score(logp, ref_log_prob[steps], args.gamma)
        return preference_loss(score, direction[pairs], args.alpha)

    # The runs of one seed share all but parameters and preferences: the inner map's None.
    all_runs = torch.vmap(torch.vmap(run_loss, in_dims=(0, 0, None)))
    parameters = {
        name: p.detach()[:, None].repeat_interleave(len(limits), 1).requires_grad_()
        for name, p in parameters.items()
    }  # [S, K, ...]
    optimizer = torch.optim.Adam(parameters.values(), lr=args.lr, fused=True)

    def align() -> dict[str, Tensor]:
        """A step of alignment: the loss of every run, eq. 4, on pairs drawn for each seed."""
        batch = draw(num_pairs, args.batch_size, args.batch_size * 2 * length)
        loss, metrics = all_runs(parameters, direction, (starts, ref_log_prob, *batch))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        return metrics

    align = captured(align, optimizer, generators, args.cudagraphs)
    first, last = args.bc_steps + 1, args.bc_steps + args.steps
    for step in run.steps("align", first, last, parameters, generators, optimizer=optimizer):
        run.log("align", step, align())
        run.evaluate("align", step, parameters)
    run.finish(parameters, final={}, stage_ends=args.bc_steps)


def load_policy(config: dict, parameters: dict[str, Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """Rebuild one policy for evaluation: observations [n, .] -> actions [n, .], dropout off."""
    hidden, output = parameters["hidden1.weight"], parameters["output.weight"]
    policy = Policy(hidden.shape[1], output.shape[0], hidden.shape[0])
    policy.load_state_dict(parameters)
    return lambda observations: policy(torch.from_numpy(observations)).detach().numpy()


if __name__ == "__main__":
    run_main(main)

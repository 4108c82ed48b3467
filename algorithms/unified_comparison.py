"""Unified Comparison: one preference for safe and good at once, in one file.

    python algorithms/unified_comparison.py --task BallRun
    python algorithms/unified_comparison.py --task BallRun --seeds 0 1 2

It sees PreSa's feedback and merges it: a safe segment is preferred to an unsafe one, whichever did
better; of two safe or two unsafe ones the better is. First the policy imitates all segments and is
frozen as the reference. Then it is aligned: it explains these preferences (contrastive preference
learning). That is PreSa's preference term alone, with other preferences:

    min_theta  E[-log sigmoid(alpha (Psi(s+) - Psi(s-)))]                                (eq. 2-4)

    paper          here                    meaning
    sigma          segment                 L consecutive steps (s_t, a_t) of one episode
    sigma+/-       preferred, rejected     the two segments of a pair, after merging
                   order                   which of a pair's two segments are these, 0 or 1 each
    log pi(a|s)    log_prob                -|pi(s) - a|^2, a Gaussian of fixed variance (B.4)
    psi / beta     score, Psi above        sum_t gamma^t log pi(a_t|s_t) / pi_ref(a_t|s_t) (eq. 7)
    alpha          alpha                   temperature (eq. 3)
    kappa, T_max   cost_limit, horizon     behind the labels: safe iff cost <= kappa L / T_max

A pair without a preference serves where its labels differ. The paper has this method in Table 8 and
names no settings of it: they are those of PreSa.

R = seeds x cost limits are trained at once: the code is written for one run, `torch.vmap` maps it
over all. A seed fixes initial weights, segments, batches and dropout; the limit only the labels.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.args import FeedbackArgs, OutputArgs, UserError, get_device, parse_args, run_main
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
    """Unified Comparison: safe before unsafe, then better before worse, as one preference."""

    # ---- objective
    alpha: float | None = None
    """alpha, temperature of the preference (eq. 3); default: 6 / steps of a segment (as PreSa)"""
    gamma: float = 1.0
    """gamma, discount inside a segment (eq. 7; the paper's proof: close to 1)"""

    # ---- optimisation
    bc_steps: int = 1_500
    """steps of behaviour cloning, before alignment (ours)"""
    bc_lr: float = 1e-3
    """learning rate of behaviour cloning, Adam (ours)"""
    bc_batch_size: int = 512
    """transitions a step of behaviour cloning (ours)"""
    steps: int = 1_000
    """steps of alignment (PreSa: measured)"""
    lr: float = 3e-3
    """learning rate of alignment, Adam, at its highest, after a tenth of the steps (as PreSa's)"""
    batch_size: int = 16
    """pairs a step of alignment (PreSa: measured)"""
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


def unified_preference(safe_label: Tensor, has_preference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prefer safe to unsafe, whichever did better; of two that are alike, the better one.

    safe_label [..., 2] is of each pair's segments, the better one first; has_preference [...] is 0
    where nobody said which is. Returns the labels with the preferred one first, where it stood
    (0 or 1) and where the other, [..., 2] both, and has_preference after merging.
    """
    safe_label = safe_label * safe_label.prod(-1, keepdim=True).abs()  # one label says nothing
    safe_label, order = safe_label.sort(dim=-1, descending=True, stable=True)  # if alike, as is
    differ = (safe_label[..., 0] != safe_label[..., 1]).float()
    return safe_label, order, torch.maximum(has_preference, differ)


def alignment_loss(
    score: Tensor,
    labels: tuple[Tensor, Tensor, Tensor],
    alpha: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4 for one run: the loss of a batch, and what to log of it, all scalars.

    score is [B, 2], of both segments; labels are safe_label [B, 2], order [B, 2] and has_preference
    [B] (0: the pair is left out), as of ``unified_preference``.
    """
    safe_label, order, has_preference = labels
    score = score.gather(1, order)  # the preferred one first
    loss = preference_loss(score, has_preference, alpha)

    safe, unsafe = (safe_label > 0).float(), (safe_label < 0).float()
    right = (score[:, 0] > score[:, 1]).float()
    metrics = {
        "loss": loss,
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

    # ---- setup: nothing is written before all input is checked
    task = get_task(args.task, args.env_id)
    device = get_device(args.device)
    dataset = load_dataset(task, args.data)
    feedback = get_feedback(dataset, task, args)
    segments, safe_label, has_preference = feedback.tensors(device)  # of a pair the preferred first
    safe_label, order, has_preference = unified_preference(safe_label, has_preference)
    if not has_preference.any(1).all():
        raise UserError("--feedback: at a limit no pair prefers either segment; label more pairs")
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
        "loss": "-log probability of a preference, in training; 0.69 is a coin's",
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

    # ---- stage two: alignment; a policy for each of R = S x K runs
    seed_of = torch.arange(len(args.seeds), device=device).repeat_interleave(len(limits))  # [R]
    aligned = {
        name: x.detach()[seed_of].requires_grad_(x.requires_grad) for name, x in reference.items()
    }
    length = segments.shape[-1]
    alpha = 6 / length if args.alpha is None else args.alpha  # a score adds up L steps
    rows = args.batch_size * 2 * length  # transitions in a batch

    def run_loss(parameters, labels, seed, pairs, masks):
        """Eq. 4 of one run, on the batch of pairs drawn for its seed."""
        batch = segments[seed, pairs]  # [B, 2, L]
        mean = functional_call(policy, parameters, (observations[batch].flatten(0, 2), masks))
        logp = log_prob(mean, actions[batch].flatten(0, 2)).view(batch.shape)
        score = segment_score(logp, ref_logp[seed, batch], args.gamma)
        labels = tuple(x[pairs] for x in labels)
        return alignment_loss(score, labels, alpha)

    optimizer = torch.optim.Adam(
        [x for x in aligned.values() if x.requires_grad], lr=args.lr, fused=True
    )
    training = {"policies": aligned, "optimizer": optimizer, "generators": generators}
    for step in range(run.restore("align", training, args.bc_steps) + 1, last + 1):
        # 1. draw a batch of pairs for each seed; its runs share it
        pairs, masks = (x[seed_of] for x in draw(segments.shape[1], args.batch_size, rows))
        # 2. the loss of every run, eq. 4
        labels = (safe_label, order, has_preference)
        loss, metrics = torch.vmap(run_loss)(aligned, labels, seed_of, pairs, masks)  # [R] each
        # 3. theta descends, by steps that grow for the first tenth and then shrink to 0
        done = (step - args.bc_steps) / args.steps
        optimizer.param_groups[0]["lr"] = args.lr * min(done / 0.1, (1 - done) / 0.9)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        # 4. log, evaluate, save
        run.log("align", step, metrics)
        if step % args.eval_every == 0:
            run.evaluate("align", step, aligned)
        if step % args.checkpoint_every == 0:
            run.save("align", step, training)
    run.finish(aligned, {}, stage_ends=args.bc_steps, reference=reference)


def load_policy(config: dict, parameters: dict[str, Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """Rebuild one policy for evaluation: observations [n, .] -> actions [n, .], dropout off."""
    policy = Policy(config["observation_dim"], config["action_dim"], config["hidden_size"])
    policy.load_state_dict(parameters)
    return lambda observations: policy(torch.from_numpy(observations)).detach().numpy()


if __name__ == "__main__":
    run_main(main)

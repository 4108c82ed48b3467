"""BC-Safe-Seg: imitate the segments that people call safe, in one file.

    python algorithms/bc_safe_seg.py --task BallRun
    python algorithms/bc_safe_seg.py --task BallRun --seeds 0 1 2

Of each segment of behaviour people say whether it was safe; the policy does what was done in the
safe ones. It does not see which did better, nor learn anything from the unsafe ones:

    min_theta  E_{(s, a) of segments with y = +1} |pi(s) - a|^2

    paper          here                    meaning
    sigma          segment                 L consecutive steps (s_t, a_t) of one episode
    y              safe_label              +1 safe, -1 unsafe
    log pi(a|s)    log_prob                -|pi(s) - a|^2, a Gaussian of fixed variance (B.4)
    kappa, T_max   cost_limit, horizon     behind the labels: safe iff cost <= kappa L / T_max

Seeds x cost limits are trained at once: the code is written for one run, `torch.vmap` maps it over
all. A seed fixes initial weights, segments, draws and dropout masks; the limit only the labels.
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

from common.args import GraphArgs, LabelArgs, check_args
from common.cli import get_device, parse_args, run_main
from common.dataset import load_dataset
from common.dropout import dropout_masks
from common.feedback import get_feedback
from common.gpu import captured
from common.results import Run
from common.tasks import get_task


@dataclass
class Args(GraphArgs, LabelArgs):
    """BC-Safe-Seg: behaviour cloning on the segments labelled safe."""

    # ---- optimisation
    steps: int = 4_500
    """steps of behaviour cloning (ours: as many as both stages of PreSa)"""
    lr: float = 1e-3
    """learning rate, Adam (ours: that of PreSa's first stage)"""
    batch_size: int = 512
    """transitions a step (ours)"""
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


def main() -> None:
    args = parse_args(Args)
    check_args(args)

    # ---- setup: nothing is written before all input is checked
    task = get_task(args.task, args.env_id)
    device = get_device(args.device)
    dataset = load_dataset(task, args.data)
    feedback = get_feedback(dataset, task, args)
    starts, safe_label, _ = feedback.tensors(device)
    starts, safe = starts.flatten(1), safe_label.flatten(2) > 0  # [S, 2P], [S, K, 2P]
    order, count = (~safe).long().argsort(stable=True), safe.sum(2)  # the safe segments first
    limits, length = feedback.cost_limits, feedback.segment_length
    observations = torch.from_numpy(dataset.observations).to(device)
    actions = torch.from_numpy(dataset.actions).to(device)
    run = Run(args, __file__, task, dataset, limits, args.steps, feedback)
    policies, generators = [], []
    for seed in args.seeds:
        torch.manual_seed(seed)
        sizes = (observations.shape[1], actions.shape[1], args.hidden_size)
        policies.append(Policy(*sizes).to(device))
        generators.append(torch.Generator(device).manual_seed(seed))
    policy, (parameters, _) = policies[0], stack_module_state(policies)  # each [S, ...]

    def draw(size: int) -> tuple[Tensor, Tensor]:
        """Random numbers [S, size] in [0, 2^62) and dropout masks [S, 2, size, hidden_size]."""
        index = [torch.randint(2**62, (size,), generator=g, device=device) for g in generators]
        masks = dropout_masks((2, size, args.hidden_size), args.dropout, generators)
        return torch.stack(index), masks

    # ---- behaviour cloning on the transitions of safe segments
    def bc_loss(parameters, labels, shared):
        """E |pi(s) - a|^2 for one seed and limit, on the first ``count`` segments of ``order``."""
        (order, count), (starts, drawn, masks) = labels, shared
        steps = starts[order[drawn // length % count]] + drawn % length  # [B]
        mean = functional_call(policy, parameters, (observations[steps], masks))
        return -log_prob(mean, actions[steps]).mean()

    # The runs of one seed share all but parameters and labels: the inner map's None.
    all_runs = torch.vmap(torch.vmap(bc_loss, in_dims=(0, 0, None)))
    parameters = {
        name: p.detach()[:, None].repeat_interleave(len(limits), 1).requires_grad_()
        for name, p in parameters.items()
    }  # [S, K, ...]
    optimizer = torch.optim.Adam(parameters.values(), lr=args.lr, fused=True)

    def imitate() -> dict[str, Tensor]:
        """A step of behaviour cloning; what to log of it."""
        loss = all_runs(parameters, (order, count), (starts, *draw(args.batch_size)))  # [S, K]
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        return {"loss": loss.detach()}

    imitate = captured(imitate, optimizer, generators, args.cudagraphs)
    for step in run.steps("bc", 1, args.steps, parameters, generators, optimizer=optimizer):
        run.log("bc", step, imitate())
        run.evaluate("bc", step, parameters)
    run.finish(parameters, final={"imitated_share": count / safe.shape[2]})


def load_policy(config: dict, parameters: dict[str, Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """Rebuild one policy for evaluation: observations [n, .] -> actions [n, .], dropout off."""
    hidden, output = parameters["hidden1.weight"], parameters["output.weight"]
    policy = Policy(hidden.shape[1], output.shape[0], hidden.shape[0])
    policy.load_state_dict(parameters)
    return lambda observations: policy(torch.from_numpy(observations)).detach().numpy()


if __name__ == "__main__":
    run_main(main)

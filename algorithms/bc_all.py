"""BC-All: imitate every trajectory, in one file.

    python algorithms/bc_all.py --task BallRun
    python algorithms/bc_all.py --task BallRun --seeds 0 1 2

The first thing to compare with: a policy that does what was done, good or bad, safe or not. It sees
no feedback, and neither rewards nor costs:

    min_theta  E_{(s, a) of all trajectories} |pi(s) - a|^2

    paper          here                    meaning
    log pi(a|s)    log_prob                -|pi(s) - a|^2, a Gaussian of fixed variance (B.4)
    kappa          cost_limit              plays no part: one policy a seed, scored at each limit

R = seeds are trained at once: the code is written for one run, `torch.vmap` maps it over all. A
seed fixes initial weights, batches and dropout.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.args import OutputArgs, TaskArgs, get_device, parse_args, run_main
from common.dataset import get_cost_limits, load_dataset
from common.results import Run
from common.tasks import get_task

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state


@dataclass
class Args(OutputArgs, TaskArgs):
    """BC-All: behaviour cloning on every trajectory."""

    # ---- optimisation
    steps: int = 4_500
    """steps of behaviour cloning (ours: more than both stages of PreSa)"""
    lr: float = 1e-3
    """learning rate, Adam (ours: that of PreSa's first stage)"""
    batch_size: int = 512
    """transitions a step (ours)"""
    hidden_size: int = 256
    """units of each of the two hidden layers (paper, B.4)"""
    dropout: float = 0.25
    """probability of dropping a hidden unit (B.4 names no value; ours)"""


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


def main() -> None:
    args = parse_args(Args)

    # ---- setup: nothing is written before all input is checked
    task = get_task(args.task, args.env_id)
    device = get_device(args.device)
    dataset = load_dataset(task, args.data)
    limits = get_cost_limits(task, args.cost_limits)
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
    cloned = {**parameters, **buffers}  # [R, ...] each
    run = Run(args, __file__, task, dataset, limits, args.steps)
    load_policy(run.config, {name: x[0] for name, x in cloned.items()})  # as evaluation will

    def draw(high: int, size: int, rows: int) -> tuple[Tensor, Tensor]:
        """For each seed: random indices [S, size], dropout masks [S, 2, rows, hidden_size]."""
        index = [torch.randint(high, (size,), generator=g, device=device) for g in generators]
        shape = (2, rows, args.hidden_size)
        uniform = torch.stack([torch.rand(shape, generator=g, device=device) for g in generators])
        return torch.stack(index), uniform.ge_(args.dropout).div_(1 - args.dropout)

    # ---- behaviour cloning on all transitions
    def bc_loss(parameters, batch, masks):
        """E |pi(s) - a|^2 of one run, on a batch of transitions."""
        mean = functional_call(policy, parameters, (observations[batch], masks))
        return -log_prob(mean, actions[batch]).mean()

    optimizer = torch.optim.Adam(parameters.values(), lr=args.lr, fused=True)
    training = {"policies": cloned, "optimizer": optimizer, "generators": generators}
    for step in range(run.restore("bc", training) + 1, args.steps + 1):
        batch, masks = draw(len(observations), args.batch_size, args.batch_size)
        loss = torch.vmap(bc_loss)(cloned, batch, masks)  # [R]
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        run.log("bc", step, {"loss": loss.detach()})
        if step % args.eval_every == 0:
            run.evaluate("bc", step, cloned)
        if step % args.checkpoint_every == 0:
            run.save("bc", step, training)
    run.finish(cloned, {})


def load_policy(config: dict, parameters: dict[str, Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """Rebuild one policy for evaluation: observations [n, .] -> actions [n, .], dropout off."""
    policy = Policy(config["observation_dim"], config["action_dim"], config["hidden_size"])
    policy.load_state_dict(parameters)
    return lambda observations: policy(torch.from_numpy(observations)).detach().numpy()


if __name__ == "__main__":
    run_main(main)

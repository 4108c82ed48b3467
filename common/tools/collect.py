"""Make an offline dataset with PPO-Lagrangian experts, as DSRL's were made.

    python common/tools/collect.py BallRun
    python common/tools/collect.py --env-id my_module:MyEnv-v0 --max-cost 50

A few experts learn side by side, each under a cost limit of its own that is swept down and up while
it learns (DSRL, section 4). Every finished episode is a candidate; those beyond the largest cost or
below the smallest return are dropped, the others thinned on a grid of cost x return, so that the
dense corners of the plane do not drown the rest. The file has DSRL's keys, and in its attributes
the command, the versions and the seed it was made with.

    limit          what an episode of this expert may cost for now
    multiplier     lambda >= 0, how much cost weighs against reward: a PI controller's output
                   (Stooke et al. 2020) on mean episode cost minus limit
    advantage      (A_reward / std - lambda A_cost / std) / (1 + lambda), of PPO's clipped loss

M experts are stacked along a leading axis and act in one forward pass; the environments are stepped
by several processes. Each environment has its own random stream, so that the number of processes
changes no number.
"""

import contextlib
import math
import multiprocessing
import signal
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.args import TrainingError, UserError, parse_args, progress_bar, run_main, whole_file
from common.evaluation import cpu_cores
from common.simulators import check_installed, make
from common.tasks import get_task, infos, reference_returns
from common.tools import check_output

import h5py
import numpy as np
import torch
import tyro
from torch import Tensor, nn

GRID = 40  # cells along cost and along return (DSRL, section 4)
MULTIPLIER_P = 2.0  # gain, per (cost - limit) / max-cost (measured)
MULTIPLIER_I = 0.1  # gain, per iteration (measured)
MULTIPLIER_MAX = 5.0  # beyond it the reward would be forgotten (measured)
GAMMA, GAE_LAMBDA = 0.99, 0.95  # discount, and the advantage's lambda (PPO's)
CLIP = 0.2  # how far an action's probability may change in an iteration (PPO's)


@dataclass
class Args:
    """Collect a dataset with PPO-Lagrangian experts."""

    # ---- task and output
    task: tyro.conf.Positional[str] = "BallRun"
    """name of the task"""
    env_id: str | None = None
    """your own environment in place of the task"""
    output: Path | None = None
    """HDF5 file to write; default: Safety<task>.hdf5 in this folder"""
    seed: int = 0
    """fixes initial weights, environments, exploration and thinning"""
    workers: int | None = None
    """processes that step the environments, this one among them; default: one a core"""

    # ---- what is kept
    episodes: int | None = None
    """episodes to keep at most; default: as many as DSRL's file has, or 1,000"""
    max_cost: float | None = None
    """largest cost of an episode; default: DSRL's, and of your own task you must say it"""
    min_return: float | None = None
    """smallest return of an episode; default: DSRL's, or none"""
    next_observations: bool = True
    """write them too, as DSRL does; nothing here reads them, and they double the file"""
    best_within: tuple[float, ...] = ()
    """costs; the best episode within each is kept, even if its cell has a costlier, better one"""

    # ---- the experts and their limits
    steps: int = 3_000_000
    """environment steps, of all experts together (measured)"""
    experts: int = 2
    """experts, whose sweeps are spread evenly over the cycle (measured)"""
    sweeps: float = 1.0
    """how often a limit goes from max-cost to 0 and back (measured)"""
    sweep_power: float = 1.5
    """above 1, more is tried at small costs, where limits matter most (measured)"""

    # ---- PPO
    envs: int = 32
    """environments, shared out among the experts (ours)"""
    rollout: int = 200
    """steps of each environment per iteration (ours)"""
    epochs: int = 8
    """passes over the steps of an iteration (ours)"""
    batch_size: int = 512
    """steps of each expert in a minibatch (ours)"""
    lr: float = 3e-4
    """learning rate, Adam (PPO's)"""
    std_start: float = 0.6
    """standard deviation of the first actions, in an action box of [-1, 1] (ours)"""
    std_end: float = 0.2
    """of the last ones; it falls geometrically (ours)"""
    hidden_size: int = 64
    """units of each of the two hidden layers of actor and critic (PPO's)"""


class Experts(nn.Module):
    """M actors and M critics, tanh, two hidden layers; the critics value reward and cost."""

    def __init__(self, experts: int, observation_dim: int, action_dim: int, hidden_size: int):
        super().__init__()
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for name, out, gain in (("actor", action_dim, 0.01), ("critic", 2, 1.0)):
            sizes = (observation_dim, hidden_size, hidden_size, out)
            for layer, scale in enumerate((2**0.5, 2**0.5, gain)):
                weight = torch.empty(experts, sizes[layer], sizes[layer + 1])
                for expert in weight:
                    nn.init.orthogonal_(expert, scale)
                self.weights[f"{name}{layer}"] = nn.Parameter(weight)
                self.biases[f"{name}{layer}"] = nn.Parameter(weight.new_zeros(weight[:, :1].shape))

    def forward(self, name: str, observation: Tensor) -> Tensor:
        """[M, N, observation_dim] -> actor: mean actions [M, N, action_dim]; critic: [M, N, 2]."""
        hidden = observation
        for layer in range(3):
            key = f"{name}{layer}"
            hidden = torch.baddbmm(self.biases[key], hidden, self.weights[key])
            hidden = torch.tanh(hidden) if layer < 2 else hidden
        return hidden


def log_prob(mean: Tensor, std: float, action: Tensor) -> Tensor:
    """Log-density of a Gaussian, up to a constant: [..., action_dim] twice -> [...]."""
    return -0.5 * ((action - mean) / std).square().sum(-1)


def generalised_advantage(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, ended: Tensor
) -> Tensor:
    """GAE (Schulman et al. 2016) over the first axis, time: all [T, ...] -> [T, ...].

    A terminated episode is worth nothing afterwards; one cut by the clock (ended, not terminated)
    would have gone on, so its last state's value counts.
    """
    delta = reward + GAMMA * (1 - terminated) * next_value - value
    advantage, running = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        running = delta[t] + GAMMA * GAE_LAMBDA * (1 - ended[t]) * running
        advantage[t] = running
    return advantage


def lagrangian_advantage(advantage: Tensor, multiplier: Tensor) -> Tensor:
    """Advantages of reward and cost [M, N, 2], with multipliers [M] -> one advantage [M, N].

    Both are scaled to a standard deviation of 1, so a multiplier means the same in every task; a
    cost that hardly varies is not blown up.
    """
    centred = advantage - advantage.mean(1, keepdim=True)
    std = centred.std(1, keepdim=True)
    reward = centred[..., 0] / (std[..., 0] + 1e-6)
    cost = centred[..., 1] / std[..., 1].clamp(min=0.5)
    multiplier = multiplier[:, None]
    return (reward - multiplier * cost) / (1 + multiplier)


def ppo_loss(new: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """PPO's clipped loss of log-probs and advantages, all [M, N] -> [M]."""
    ratio = (new - old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean(1)


def limits_at(progress: float, experts: int, args: Args, max_cost: float) -> np.ndarray:
    """The experts' cost limits, [M], when a share ``progress`` of the steps is done."""
    phase = (progress * args.sweeps + np.arange(experts) / experts) % 1
    return max_cost * np.abs(1 - 2 * phase) ** args.sweep_power  # max-cost, 0, max-cost


# ---------------------------------------------------------------------------- the environments


class Share:
    """Some of the environments, n of them, stepped one after the other."""

    def __init__(self, env_id: str, numbers: list[int], seed: int):
        """Start them; their numbers, with the seed, fix their random streams."""
        self.numbers, self.seed, self.started = numbers, seed, [0] * len(numbers)
        self.envs = [make(env_id) for _ in numbers]
        self.following = [self.reset(i) for i in range(len(numbers))]

    def reset(self, i: int) -> np.ndarray:
        """Start an episode; the Bullet tasks draw from the global stream while they do."""
        words = np.random.SeedSequence((self.seed, self.numbers[i], self.started[i]))
        word = words.generate_state(1).item()
        self.started[i] += 1
        np.random.seed(word)
        return self.envs[i].reset(seed=word)[0]

    def step(self, actions: np.ndarray) -> list[np.ndarray]:
        """Play actions [n, action_dim].

        Returns what to act on next and what the actions led to, which differs where an episode has
        ended, [n, .] both; and reward, terminated, truncated and cost, [n, 4].
        """
        final, scores = [], []
        for i, action in enumerate(actions):
            observation, *score, info = self.envs[i].step(action)
            final.append(observation)
            scores.append([*score, info["cost"]])
            self.following[i] = self.reset(i) if any(score[1:]) else observation
        return [np.float32(self.following), np.float32(final), np.float64(scores)]


def serve(pipe: Connection, *share: Any) -> None:
    """A worker: send a share's first observations, then answer actions, until the pipe drops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the script itself ends on Ctrl-C, once
    share = Share(*share)
    pipe.send([np.float32(share.following)])
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(share.step(pipe.recv()))


def joined(own: list[np.ndarray], pipes: list[Connection]) -> list[np.ndarray]:
    """The own share's arrays and those that the workers answer, joined along the environments."""
    try:
        answers = [own, *(pipe.recv() for pipe in pipes)]
    except EOFError:
        raise TrainingError("an environment failed in its worker; its error is above") from None
    return [np.concatenate(arrays) for arrays in zip(*answers, strict=True)]


# ------------------------------------------------------------------------------ what is kept

KEYS = ("observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts")
Episode = dict[str, np.ndarray]  # arrays [T, ...] by DSRL's keys


def finished_episodes(unfinished: list[Episode], rollout: Episode) -> list[list[Episode]]:
    """Cut a rollout, arrays [T, envs, ...], into the episodes that ended, a list for each env.

    ``unfinished`` has what each environment began before, and gets what it has begun now.
    """
    finished = []
    for i, before in enumerate(unfinished):
        now = {key: x[:, i] for key, x in rollout.items()}
        steps = {k: np.concatenate([part[k] for part in (before, now) if part]) for k in now}
        ends = np.flatnonzero(steps["terminals"] | steps["timeouts"]) + 1
        cuts = pairwise((0, *ends, None))
        parts = [{key: x[first:last].copy() for key, x in steps.items()} for first, last in cuts]
        unfinished[i] = parts.pop()
        finished.append(parts)
    return finished


def thin(
    costs: np.ndarray, returns: np.ndarray, keep: int, seed: int, best_within: tuple[float, ...]
) -> np.ndarray:
    """Choose at most ``keep`` of the E episodes, evenly over a grid of cost x return -> indices.

    Every cell keeps the same number, as far as it has so many: its best return first, the others
    at random. The best return within each cost of ``best_within`` is kept in any case: its cell
    may hold a better one that costs more.
    """
    within = [costs <= limit for limit in best_within]
    leaders = [np.where(x, returns, -np.inf).argmax() for x in within if x.any()]
    edges = [np.linspace(x.min(), x.max(), GRID + 1)[1:-1] for x in (costs, returns)]
    cell = np.digitize(costs, edges[0]) * GRID + np.digitize(returns, edges[1])
    order, cells = np.random.default_rng(seed).permutation(len(cell)), {}
    for e in order:
        cells.setdefault(cell[e], []).append(e)
    rank = np.empty(len(cell), int)  # in its cell
    for members in cells.values():
        members.insert(0, members.pop(returns[members].argmax()))
        rank[members] = range(len(members))
    order = order[np.argsort(rank[order] > 0, kind="stable")]
    per_cell = (np.bincount(rank).cumsum() <= keep).sum()
    chosen = order[rank[order] < per_cell]
    filling = order[rank[order] == per_cell][: keep - len(chosen)]  # from the next, while it fits
    return np.sort(list(dict.fromkeys([*leaders, *chosen, *filling]))[:keep])


def main() -> None:
    args = parse_args(Args, at_least={"seed": 0, "min_return": -math.inf})
    if args.envs % args.experts:
        raise UserError(f"--envs {args.envs}: must be a multiple of --experts {args.experts}")
    if args.std_start <= 0 or args.std_end <= 0:
        raise UserError("--std-start and --std-end must be above 0")
    task = get_task(args.task, args.env_id)
    max_cost, min_return, keep = args.max_cost, -math.inf, 1000
    if task.suite != "own":  # what DSRL's own file has
        max_cost = max_cost or infos().MAX_EPISODE_COST[task.name]
        min_return = reference_returns(task)[0]
        keep = int(task.dsrl_file.removesuffix(".hdf5").split("-")[-1])
    if not max_cost:
        raise UserError(f"--max-cost: say how much an episode of {task.name} may cost, above 0")
    min_return = min_return if args.min_return is None else args.min_return
    output = args.output or Path(f"Safety{task.name}.hdf5")
    check_output(output)
    check_installed()

    # a share of the environments is stepped here, the others by workers meanwhile
    started = time.time()
    shares = np.array_split(np.arange(args.envs), min(args.workers or cpu_cores(), args.envs))
    spawn, pipes = multiprocessing.get_context("spawn"), []
    for share in shares[1:]:
        ours, theirs = spawn.Pipe()
        arguments = (theirs, task.env_id, share.tolist(), args.seed)
        spawn.Process(target=serve, args=arguments, daemon=True).start()
        theirs.close()
        pipes.append(ours)
    own = Share(task.env_id, shares[0].tolist(), args.seed)
    (observations,) = joined([np.float32(own.following)], pipes)

    torch.set_num_threads(1)  # the workers need the cores, and sums keep their order
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    n = args.envs // args.experts
    experts = Experts(args.experts, task.observation_dim, task.action_dim, args.hidden_size)
    optimizer = torch.optim.Adam(experts.parameters(), lr=args.lr, fused=True)
    low, high = np.float32(task.action_low), np.float32(task.action_high)
    unfinished: list[Episode] = [{} for _ in range(args.envs)]
    candidates: list[tuple[float, float, Episode]] = []  # cost, return, and what was played

    # running moments: of observations, shared by all experts; of values, [M, 1, 2]
    count, mean, variance = 1e-4, np.zeros(task.observation_dim), np.ones(task.observation_dim)
    value_mean, value_std = torch.zeros(args.experts, 1, 2), torch.ones(args.experts, 1, 2)
    integral = np.zeros(args.experts)
    mean_cost = np.full(args.experts, np.nan)  # of the latest episodes

    def normal(observations: np.ndarray) -> Tensor:
        """[..., envs, .] -> [M, ..., n, .], each dimension scaled to mean 0 and deviation 1."""
        scaled = ((observations - mean) / np.sqrt(variance + 1e-8)).clip(-10, 10)
        shape = (*observations.shape[:-2], args.experts, n, observations.shape[-1])
        return torch.from_numpy(scaled.astype(np.float32)).view(shape).movedim(-3, 0)

    def per_expert(array: np.ndarray) -> Tensor:
        """[T, envs, ...] -> [M, T * n, ...]."""
        shape = (args.rollout, args.experts, n, *array.shape[2:])
        return torch.from_numpy(np.float32(array)).view(shape).movedim(1, 0).flatten(1, 2)

    iterations = -(-args.steps // (args.rollout * args.envs))
    bar = progress_bar(total=iterations)
    for iteration in range(iterations):
        progress = iteration / iterations
        limit = limits_at(progress, args.experts, args, max_cost)
        std = args.std_start * (args.std_end / args.std_start) ** progress

        # 1. act, with noise
        rows = []
        for _ in range(args.rollout):
            with torch.no_grad():
                action = experts("actor", normal(observations))  # [M, n, action_dim]
                action += std * torch.randn(action.shape, generator=generator)
            drawn = action.reshape(args.envs, -1).numpy()
            played = low + (drawn.clip(-1, 1) + 1) / 2 * (high - low)
            for pipe, share in zip(pipes, shares[1:], strict=True):
                pipe.send(played[share])
            following, final, scores = joined(own.step(played[shares[0]]), pipes)
            reward, terminated, truncated, cost = scores.T
            ended = (terminated > 0, (truncated > 0) & (terminated == 0))
            scores = (np.float32(reward), np.float32(cost), *ended)
            rows.append((observations, final, played, *scores, drawn))
            observations = following
        *kept, drawn = (np.stack(x) for x in zip(*rows, strict=True))  # [T, envs, ...] each
        rollout = dict(zip(KEYS, kept, strict=True))
        episodes = finished_episodes(unfinished, rollout)
        for episode in chain.from_iterable(episodes):
            cost, total = float(episode["costs"].sum()), float(episode["rewards"].sum())
            if cost <= max_cost and total >= min_return:
                candidates.append((cost, total, episode))

        # 2. the multipliers
        for m in range(args.experts):
            costs = [e["costs"].sum() for ended in episodes[m * n : (m + 1) * n] for e in ended]
            if costs:
                weight = 1 if np.isnan(mean_cost[m]) else min(1, len(costs) / n)
                before = np.nan_to_num(mean_cost[m]) * (1 - weight)
                mean_cost[m] = before + weight * np.mean(costs)
        excess = np.nan_to_num(mean_cost - limit) / max_cost
        integral = (integral + MULTIPLIER_I * excess).clip(0, MULTIPLIER_MAX)
        multiplier = (integral + MULTIPLIER_P * excess).clip(0, MULTIPLIER_MAX)

        # 3. advantages
        observation = normal(rollout["observations"]).flatten(1, 2)  # [M, T * n, .]
        action = per_expert(drawn)
        scores = per_expert(np.stack((rollout["rewards"], rollout["costs"]), -1))
        terminated = per_expert(rollout["terminals"][..., None])
        ended = per_expert((rollout["terminals"] | rollout["timeouts"])[..., None])
        with torch.no_grad():
            old = log_prob(experts("actor", observation), std, action)
            value = experts("critic", observation) * value_std + value_mean
            after = normal(rollout["next_observations"]).flatten(1, 2)
            next_value = experts("critic", after) * value_std + value_mean
            by_time = [
                x.view(args.experts, args.rollout, n, -1).movedim(1, 0)
                for x in (scores, value, next_value, terminated, ended)
            ]
            gains = generalised_advantage(*by_time)
            gains = gains.movedim(0, 1).flatten(1, 2)  # [M, T * n, 2]
            target = value + gains
            advantage = lagrangian_advantage(gains, torch.from_numpy(np.float32(multiplier)))
            # The critics' outputs have mean 0 and deviation 1, whatever rewards are like; when
            # those moments move, the last layer moves with them and no value changes (PopArt,
            # van Hasselt et al. 2016).
            step = 1.0 if iteration == 0 else 0.1
            new_mean = value_mean + step * (target.mean(1, keepdim=True) - value_mean)
            new_std = value_std + step * (target.std(1, keepdim=True) + 1e-3 - value_std)
            weight, bias = experts.weights["critic2"], experts.biases["critic2"]
            bias.copy_((bias * value_std + value_mean - new_mean) / new_std)
            weight.mul_(value_std / new_std)
            value_mean, value_std = new_mean, new_std
            target = (target - value_mean) / value_std

        # 4. PPO
        for _ in range(args.epochs):
            shuffled = torch.randperm(args.rollout * n, generator=generator)
            for batch in shuffled.split(args.batch_size):
                new = log_prob(experts("actor", observation[:, batch]), std, action[:, batch])
                actor = ppo_loss(new, old[:, batch], advantage[:, batch])  # [M]
                error = experts("critic", observation[:, batch]) - target[:, batch]
                loss = (actor + 0.5 * error.square().mean((1, 2))).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is not finite in iteration {iteration}; lower --lr")

        # 5. moments of the observations (Chan et al. 1979)
        seen = rollout["observations"].reshape(-1, task.observation_dim).astype(np.float64)
        total, shift = count + len(seen), seen.mean(0) - mean
        mean = mean + shift * len(seen) / total
        within, between = seen.var(0) * len(seen), shift**2 * count * len(seen) / total
        variance, count = (variance * count + within + between) / total, total
        bar.update()
        best = max((total for _, total, _ in candidates), default=math.nan)
        bar.set_postfix_str(f"{len(candidates)} candidates, best return {best:.0f}", refresh=False)
    bar.close()

    if not candidates:
        raise TrainingError("no episode is to be kept; give a larger --max-cost or more --steps")
    costs, returns, episodes = zip(*candidates, strict=True)
    costs, returns = np.asarray(costs), np.asarray(returns)
    chosen = thin(costs, returns, args.episodes or keep, args.seed, args.best_within)
    packages = ("torch", "numpy", "gymnasium", "dsrl", "bullet-safety-gym", "safety-gymnasium")
    attributes = {
        "provenance": "PPO-Lagrangian experts, thinned; made by common/tools/collect.py of PreSa",
        "command": " ".join(["python common/tools/collect.py", *sys.argv[1:]]),
        "environment": task.env_id,
        "versions": ", ".join(f"{p} {version(p)}" for p in packages),
        "seed": str(args.seed),
        "settings": str(args),
    }
    left_out = () if args.next_observations else ("next_observations",)
    with whole_file(output) as part, h5py.File(part, "w") as file:
        for key in (key for key in KEYS if key not in left_out):
            array = np.concatenate([episodes[e][key] for e in chosen])
            file.create_dataset(key, data=array, compression="gzip", shuffle=True)
        file.attrs.update(attributes)
    print(
        f"{output}: {len(chosen)} of {len(costs)} episodes, {time.time() - started:.0f} s; "
        "python common/tools/card.py shows it"
    )


if __name__ == "__main__":
    run_main(main)

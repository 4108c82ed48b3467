"""Make an offline dataset with PPO-Lagrangian experts, as DSRL's were made.

    python common/collect.py BallRun
    python common/collect.py --env-id my_module:MyEnv-v0 --max-cost 50

A few experts learn side by side, each under a cost limit of its own that is swept down and up while
it learns (DSRL, section 4). Every finished episode is a candidate; those beyond the largest cost or
below the smallest return are dropped, the others thinned on a grid of cost x return, so that the
dense corners of the plane do not drown the rest. The file has DSRL's keys, and in its attributes
the command, the versions and the seed it was made with.

    limit          what an episode of this expert may cost for now
    multiplier     lambda >= 0, how much cost weighs against reward: a PI controller's output
                   (Stooke et al. 2020) on mean episode cost minus limit
    advantage      (A_reward / std - lambda A_cost / std) / (1 + lambda), of PPO's clipped loss

Between a policy that keeps the limit and one that breaks it at every step there may be none: then
``--relays`` has a cautious and a bold expert share an episode, each as it was at some time in the
second half of learning, one taking over from the other; the bold one mostly plays the lesser part.

M experts are stacked along a leading axis and act in one forward pass; the environments are stepped
by several processes. Each environment has its own random stream, so that the number of processes
changes no number.
"""

import dataclasses
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import (
    TrainingError,
    UserError,
    check_numbers,
    check_output,
    cpu_cores,
    parse_args,
    progress_bar,
    run_main,
    whole_file,
)
from common.simulators import check_installed, make
from common.tasks import Task, get_task, reference_returns
from common.tasks import max_cost as dsrl_max_cost


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
    grid: int = 40
    """cells along cost and along return (DSRL, section 4)"""
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
    multiplier_p: float = 2.0
    """proportional gain of the multiplier, per (cost - limit) / max-cost (measured)"""
    multiplier_i: float = 0.1
    """integral gain of the multiplier, per iteration (measured)"""
    multiplier_max: float = 5.0
    """largest multiplier: beyond it the reward would be forgotten (measured)"""
    relays: float = 0.0
    """share of the steps, the last ones, where two experts of the past share an episode (ours)"""

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
    gamma: float = 0.99
    """discount of reward and of cost (PPO's)"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation (PPO's)"""
    clip: float = 0.2
    """how far an action's probability may change in an iteration (PPO's)"""
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
    """Of a Gaussian, up to a constant: [..., action_dim] twice -> [...]."""
    return -0.5 * ((action - mean) / std).square().sum(-1)


def generalised_advantage(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    ended: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """GAE (Schulman et al. 2016) over the first axis, time: all [T, ...] -> [T, ...].

    A terminated episode is worth nothing afterwards; one cut by the clock (ended, not terminated)
    would have gone on, so its last state's value counts.
    """
    delta = reward + gamma * (1 - terminated) * next_value - value
    advantage, running = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        running = delta[t] + gamma * gae_lambda * (1 - ended[t]) * running
        advantage[t] = running
    return advantage


def lagrangian_advantage(advantage: Tensor, multiplier: Tensor) -> Tensor:
    """Of reward and cost [M, N, 2], with multipliers [M] -> one advantage [M, N].

    Both are scaled to a standard deviation of 1, so a multiplier means the same in every task; a
    cost that hardly varies is not blown up.
    """
    centred = advantage - advantage.mean(1, keepdim=True)
    std = centred.std(1, keepdim=True)
    reward = centred[..., 0] / (std[..., 0] + 1e-6)
    cost = centred[..., 1] / std[..., 1].clamp(min=0.5)
    multiplier = multiplier[:, None]
    return (reward - multiplier * cost) / (1 + multiplier)


def ppo_loss(new: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped loss of log-probs and advantages, all [M, N] -> [M]."""
    ratio = (new - old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean(1)


def limits_at(progress: float, experts: int, args: Args, max_cost: float) -> np.ndarray:
    """The experts' cost limits, [M], when a share ``progress`` of the steps is done."""
    phase = (progress * args.sweeps + np.arange(experts) / experts) % 1
    return max_cost * np.abs(1 - 2 * phase) ** args.sweep_power  # max-cost, 0, max-cost


class Share:
    """Some of the environments, stepped one after the other."""

    def __init__(self, env_id: str, numbers: list[int], seed: int):
        """numbers: those of the environments; with the seed they fix each one's random stream."""
        self.numbers, self.seed, self.started = numbers, seed, [0] * len(numbers)
        self.envs = [make(env_id) for _ in numbers]
        self.observations = np.asarray([self._reset(i) for i in range(len(numbers))], np.float32)

    def _reset(self, i: int) -> np.ndarray:
        """Start an episode; the Bullet tasks draw from the global stream while they do."""
        words = np.random.SeedSequence((self.seed, self.numbers[i], self.started[i]))
        word = int(words.generate_state(1)[0])
        self.started[i] += 1
        np.random.seed(word)
        return self.envs[i].reset(seed=word)[0]

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Actions [n, action_dim] -> observations to act on next, final ones, scores.

        Both observations are [n, .] and differ where an episode has ended; scores are reward,
        cost, terminated, truncated, [4, n].
        """
        following, final, scores = [], [], np.zeros((4, len(self.envs)))
        for i, env in enumerate(self.envs):
            observation, reward, terminated, truncated, info = env.step(actions[i])
            scores[:, i] = reward, info["cost"], terminated, truncated
            final.append(observation)
            following.append(self._reset(i) if terminated or truncated else observation)
        return np.asarray(following, np.float32), np.asarray(final, np.float32), scores


def serve(pipe, env_id: str, numbers: list[int], seed: int) -> None:
    """A worker: send a share's first observations, then answer actions, until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the script itself ends on Ctrl-C, once
    share = Share(env_id, numbers, seed)

    def next_actions() -> np.ndarray | None:
        """From the script; None where it was killed."""
        try:
            return pipe.recv()
        except EOFError:
            return None

    pipe.send(share.observations)
    while (actions := next_actions()) is not None:
        pipe.send(share.step(actions))


class Environments:
    """All environments: a share is stepped here, the others by worker processes meanwhile."""

    def __init__(self, task: Task, count: int, seed: int, processes: int | None):
        """Start the workers.

        Raises:
            UserError: a simulator is not installed.
        """
        check_installed()
        self.shares = np.array_split(np.arange(count), min(processes or cpu_cores(), count))
        spawn = multiprocessing.get_context("spawn")
        self.pipes = []
        for share in self.shares[1:]:
            ours, theirs = spawn.Pipe()
            arguments = (theirs, task.env_id, share.tolist(), seed)
            spawn.Process(target=serve, args=arguments, daemon=True).start()
            theirs.close()
            self.pipes.append(ours)
        self.own = Share(task.env_id, self.shares[0].tolist(), seed)
        self.observations = np.concatenate([self.own.observations, *self._receive()])
        self.elapsed = np.zeros(count, int)  # steps of the present episode

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[count, action_dim] -> final observations [count, .], scores [4, count].

        ``observations`` is then what to act on next.
        """
        for pipe, share in zip(self.pipes, self.shares[1:], strict=True):
            pipe.send(actions[share])
        parts = [self.own.step(actions[self.shares[0]]), *self._receive()]
        following, final, scores = zip(*parts, strict=True)
        self.observations = np.concatenate(following)
        scores = np.concatenate(scores, axis=1)
        self.elapsed = np.where(scores[2:].any(0), 0, self.elapsed + 1)
        return np.concatenate(final), scores

    def _receive(self) -> list:
        try:
            return [pipe.recv() for pipe in self.pipes]
        except EOFError:
            raise TrainingError(
                "an environment failed in its worker; its own error stands above"
            ) from None

    def close(self) -> None:
        """End the workers."""
        for pipe in self.pipes:
            pipe.send(None)


KEYS = ("observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts")


def roll_out(
    environments: Environments, task: Task, length: int, act: Callable[[np.ndarray], np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Step all environments: arrays [T, envs, ...] in DSRL's keys, and the actions before clipping.

    ``act`` maps observations [envs, .] to actions [envs, .] for an action box of [-1, 1].
    """
    low, high = np.float32(task.action_low), np.float32(task.action_high)
    rollout: dict[str, list[np.ndarray]] = {key: [] for key in (*KEYS, "drawn")}
    for _ in range(length):
        observations = environments.observations
        drawn = act(observations)
        played = low + (drawn.clip(-1, 1) + 1) / 2 * (high - low)
        final, (reward, cost, terminated, truncated) = environments.step(played)
        ended = (terminated > 0, (truncated > 0) & (terminated == 0))
        row = (observations, final, played, np.float32(reward), np.float32(cost), *ended, drawn)
        for key, x in zip(rollout, row, strict=True):
            rollout[key].append(x)
    stacked = {key: np.stack(x) for key, x in rollout.items()}
    return stacked, stacked.pop("drawn")


class Relay:
    """Experts of the past, two of which share an episode."""

    def __init__(self, std: float, power: float, seed: int):
        """power: the bold one's share of an episode is a uniform number to the power of it."""
        self.std, self.power, self.rng = std, power, np.random.default_rng(seed)
        self.past: list[dict[str, np.ndarray]] = []  # actors, and moments of the observations

    def remember(
        self, experts: Experts, limits: np.ndarray, mean: np.ndarray, variance: np.ndarray
    ) -> None:
        """Keep every expert's actor as it is now, under its limit [M]."""
        for m in range(len(experts.weights["actor0"])):
            actor = {"limit": limits[m], "mean": mean, "std": np.sqrt(variance + 1e-8)}
            for layer in range(3):
                weight, bias = (x[f"actor{layer}"][m] for x in (experts.weights, experts.biases))
                actor[f"weight{layer}"] = weight.detach().numpy().copy()
                actor[f"bias{layer}"] = bias[0].detach().numpy().copy()
            self.past.append(actor)

    def start(self, environments: Environments, horizon: int) -> None:
        """Have pairs of them act from now on, also in the episodes under way."""
        self.environments, self.horizon = environments, horizon
        order = np.argsort([p["limit"] for p in self.past], kind="stable")
        third, sixth = -(-len(order) // 3), -(-len(order) // 6)
        self.cautious, self.bold = order[:third], order[-sixth:]
        self.pair = np.zeros((len(environments.elapsed), 2), int)
        self.switch = np.zeros(len(environments.elapsed), int)
        self.parameters = {name: np.stack([p[name] for p in self.past]) for name in self.past[0]}
        self._draw(np.ones(len(self.pair), bool))

    def _draw(self, new: np.ndarray) -> None:
        """Of each new episode, one cautious and one bold expert in either order, and the step."""
        n = new.sum()
        pair = np.stack([self.rng.choice(part, n) for part in (self.cautious, self.bold)], 1)
        bold_first = self.rng.random(n) < 0.5
        self.pair[new] = np.where(bold_first[:, None], pair[:, ::-1], pair)
        bold_steps = self.horizon * self.rng.random(n) ** self.power
        self.switch[new] = np.where(bold_first, bold_steps, self.horizon - bold_steps)

    def act(self, observations: np.ndarray) -> np.ndarray:
        """[envs, .] -> [envs, .]; at an episode's start draw who plays it and when it changes."""
        elapsed = self.environments.elapsed
        self._draw(elapsed == 0)
        who = self.pair[np.arange(len(elapsed)), (elapsed >= self.switch).astype(int)]
        p = {name: x[who] for name, x in self.parameters.items()}
        hidden = ((observations - p["mean"]) / p["std"]).clip(-10, 10)
        for layer in range(3):
            hidden = np.einsum("ni,nio->no", hidden, p[f"weight{layer}"]) + p[f"bias{layer}"]
            hidden = np.tanh(hidden) if layer < 2 else hidden
        noise = self.std * self.rng.standard_normal(hidden.shape)
        return (hidden + noise).astype(np.float32)


class Candidates:
    """Finished episodes that may be kept, and the unfinished ones of each environment."""

    def __init__(self, envs: int, max_cost: float, min_return: float):
        self.max_cost, self.min_return = max_cost, min_return
        self.open: list[list[dict[str, np.ndarray]]] = [[] for _ in range(envs)]
        self.episodes: list[dict[str, np.ndarray]] = []
        self.returns: list[float] = []
        self.costs: list[float] = []

    def add(self, rollout: dict[str, np.ndarray]) -> list[list[float]]:
        """Take a rollout, arrays [T, envs, ...]; the costs of the episodes that ended, by env."""
        ended = rollout["terminals"] | rollout["timeouts"]
        costs: list[list[float]] = []
        for i, parts in enumerate(self.open):
            costs.append([])
            begin = 0
            for end in (*(np.flatnonzero(ended[:, i]) + 1), None):
                parts.append({key: x[begin:end, i].copy() for key, x in rollout.items()})
                if end is None:
                    break
                begin = end
                episode = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
                parts.clear()
                costs[i].append(episode["costs"].sum())
                self._consider(episode)
        return costs

    def _consider(self, episode: dict[str, np.ndarray]) -> None:
        total, cost = float(episode["rewards"].sum()), float(episode["costs"].sum())
        if cost <= self.max_cost and total >= self.min_return:
            self.episodes.append(episode)
            self.returns.append(total)
            self.costs.append(cost)

    def best(self, cost_limits: tuple[float, ...]) -> str:
        """The best return so far, overall and within each limit."""
        costs, returns = np.asarray(self.costs), np.asarray(self.returns)
        within = [returns[costs <= limit].max(initial=-np.inf) for limit in (*cost_limits, np.inf)]
        return f"{len(costs)} candidates, best returns " + " ".join(f"{x:.0f}" for x in within)


def thin(
    costs: np.ndarray,
    returns: np.ndarray,
    keep: int,
    grid: int,
    rng: np.random.Generator,
    best_within: tuple[float, ...] = (),
) -> np.ndarray:
    """Choose at most ``keep`` of the E episodes, evenly over a grid of cost x return -> indices.

    Every cell keeps the same number, as far as it has so many: its best return first, the others
    at random. The best return within each cost of ``best_within`` is kept in any case: its cell
    may hold a better one that costs more.
    """
    within = [costs <= limit for limit in best_within]
    leaders = [np.where(x, returns, -np.inf).argmax() for x in within if x.any()]
    columns = [
        np.digitize(x, np.linspace(x.min(), x.max(), grid + 1)[1:-1]) for x in (costs, returns)
    ]
    cell = columns[0] * grid + columns[1]
    order = rng.permutation(len(cell))
    best = {}
    for e in order:
        if returns[e] > returns[best.setdefault(cell[e], e)]:
            best[cell[e]] = e
    first = np.zeros(len(cell), bool)
    first[list(best.values())] = True
    order = np.concatenate((order[first[order]], order[~first[order]]))
    rank, seen = np.empty(len(cell), int), {}
    for e in order:
        rank[e] = seen[cell[e]] = seen.get(cell[e], -1) + 1
    per_cell = 0
    while per_cell <= rank.max() and (rank <= per_cell).sum() <= keep:
        per_cell += 1
    chosen = order[rank[order] < per_cell]
    filling = order[rank[order] == per_cell][: keep - len(chosen)]  # from the next, while it fits
    return np.sort(list(dict.fromkeys([*leaders, *chosen, *filling]))[:keep])


def write(
    path: Path,
    episodes: list[dict[str, np.ndarray]],
    keys: Sequence[str],
    attributes: dict[str, str],
) -> None:
    """Write episodes as a dataset in DSRL's keys; the file gets its name when it is whole."""
    with whole_file(path) as part, h5py.File(part, "w") as file:
        for key in keys:
            array = np.concatenate([episode[key] for episode in episodes])
            file.create_dataset(key, data=array, compression="gzip", shuffle=True)
        file.attrs.update(attributes)


def settings(args: Args) -> tuple[Task, Path, float, float, int]:
    """Check the arguments: task, output, largest cost, smallest return, episodes to keep.

    Raises:
        UserError: a flag is missing or out of range.
    """
    check_numbers(
        args,
        {"seed": 0, "min_return": -math.inf},
        shares=("gae_lambda", "clip", "relays"),
        below_1=("gamma",),
    )
    if args.envs % args.experts:
        raise UserError(f"--envs {args.envs}: must be a multiple of --experts {args.experts}")
    if args.std_start <= 0 or args.std_end <= 0:
        raise UserError("--std-start and --std-end must be above 0")
    task = get_task(args.task, args.env_id)
    max_cost, min_return, episodes = args.max_cost, args.min_return, args.episodes
    if task.suite == "own":
        if not max_cost:
            raise UserError(f"--max-cost: say how much an episode of {task.name} may cost, above 0")
        min_return = -np.inf if min_return is None else min_return
        episodes = episodes or 1000
    else:
        max_cost = max_cost or dsrl_max_cost(task)
        if min_return is None:
            min_return = reference_returns(task)[0]
        episodes = episodes or int(task.dsrl_file.removesuffix(".hdf5").split("-")[-1])
    output = args.output or Path(f"Safety{task.name}.hdf5")
    check_output(output)
    return task, output, max_cost, min_return, episodes


def main() -> None:
    args = parse_args(Args)
    task, output, max_cost, min_return, keep = settings(args)
    started = time.time()
    torch.set_num_threads(1)  # the workers need the cores, and sums keep their order
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    n = args.envs // args.experts
    experts = Experts(args.experts, task.observation_dim, task.action_dim, args.hidden_size)
    optimizer = torch.optim.Adam(experts.parameters(), lr=args.lr, fused=True)
    candidates = Candidates(args.envs, max_cost, min_return)
    environments = Environments(task, args.envs, args.seed, args.workers)

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

    iterations = -(-args.steps // (args.rollout * args.envs))
    learning = max(1, round((1 - args.relays) * iterations))  # the others are relays
    relay, remember_every = Relay(args.std_end, args.sweep_power, args.seed), max(1, learning // 20)
    bar = progress_bar(total=iterations)

    def show() -> None:
        bar.update()
        bar.set_postfix_str(candidates.best(task.cost_limits), refresh=False)

    for iteration in range(iterations):
        progress = iteration / learning
        limit = limits_at(progress, args.experts, args, max_cost)
        std = args.std_start * (args.std_end / args.std_start) ** progress

        # 1. act
        def explore(observations: np.ndarray, std: float = std) -> np.ndarray:
            """The experts' actions, [envs, .], with noise."""
            with torch.no_grad():
                action = experts("actor", normal(observations))  # [M, n, action_dim]
                action += std * torch.randn(action.shape, generator=generator)
            return action.reshape(args.envs, -1).numpy()

        if iteration >= learning:
            candidates.add(roll_out(environments, task, args.rollout, relay.act)[0])
            show()
            continue
        stacked, drawn = roll_out(environments, task, args.rollout, explore)
        costs = candidates.add(stacked)

        # 2. the multipliers
        for m in range(args.experts):
            finished = [cost for env in costs[m * n : (m + 1) * n] for cost in env]
            if finished:
                weight = 1 if np.isnan(mean_cost[m]) else min(1, len(finished) / n)
                mean_cost[m] = np.nan_to_num(mean_cost[m]) * (1 - weight) + weight * np.mean(
                    finished
                )
        excess = np.nan_to_num(mean_cost - limit) / max_cost
        integral = (integral + args.multiplier_i * excess).clip(0, args.multiplier_max)
        multiplier = (integral + args.multiplier_p * excess).clip(0, args.multiplier_max)

        # 3. advantages
        def per_expert(array: np.ndarray) -> Tensor:
            """[T, envs, ...] -> [M, T * n, ...]."""
            shape = (args.rollout, args.experts, n, *array.shape[2:])
            return torch.from_numpy(np.float32(array)).view(shape).movedim(1, 0).flatten(1, 2)

        observation = normal(stacked["observations"]).flatten(1, 2)  # [M, T * n, .]
        action = per_expert(drawn)
        scores = per_expert(np.stack((stacked["rewards"], stacked["costs"]), -1))
        terminated = per_expert(stacked["terminals"][..., None])
        ended = per_expert((stacked["terminals"] | stacked["timeouts"])[..., None])
        with torch.no_grad():
            old = log_prob(experts("actor", observation), std, action)
            value = experts("critic", observation) * value_std + value_mean
            after = normal(stacked["next_observations"]).flatten(1, 2)
            next_value = experts("critic", after) * value_std + value_mean
            by_time = [
                x.view(args.experts, args.rollout, n, -1).movedim(1, 0)
                for x in (scores, value, next_value, terminated, ended)
            ]
            gains = generalised_advantage(*by_time, args.gamma, args.gae_lambda)
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
            for batch in torch.randperm(args.rollout * n, generator=generator).split(
                args.batch_size
            ):
                new = log_prob(experts("actor", observation[:, batch]), std, action[:, batch])
                actor = ppo_loss(new, old[:, batch], advantage[:, batch], args.clip)  # [M]
                error = experts("critic", observation[:, batch]) - target[:, batch]
                loss = (actor + 0.5 * error.square().mean((1, 2))).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is not finite in iteration {iteration}; lower --lr")

        # 5. moments of the observations (Chan et al. 1979)
        seen = stacked["observations"].reshape(-1, task.observation_dim).astype(np.float64)
        total, shift = count + len(seen), seen.mean(0) - mean
        mean = mean + shift * len(seen) / total
        variance = (
            variance * count + seen.var(0) * len(seen) + shift**2 * count * len(seen) / total
        ) / total
        count = total
        last = iteration + 1 == learning
        late = 2 * iteration >= learning and iteration % remember_every == 0
        if learning < iterations and (last or late):
            relay.remember(experts, limit, mean, variance)
            if last:
                relay.start(environments, task.horizon)
        show()
    bar.close()
    environments.close()

    if not candidates.episodes:
        raise TrainingError("no episode is to be kept; give a larger --max-cost or more --steps")
    totals = np.asarray(candidates.costs), np.asarray(candidates.returns)
    rng = np.random.default_rng(args.seed)
    chosen = thin(*totals, keep, args.grid, rng, args.best_within)
    packages = ("torch", "numpy", "gymnasium", "dsrl", "bullet-safety-gym", "safety-gymnasium")
    attributes = {
        "provenance": "PPO-Lagrangian experts, thinned; made by common/collect.py of PreSa",
        "command": " ".join(["python common/collect.py", *sys.argv[1:]]),
        "environment": task.env_id,
        "versions": ", ".join(f"{p} {version(p)}" for p in packages),
        "seed": str(args.seed),
        "settings": ", ".join(
            f"{key} {value:g}"
            for key, value in dataclasses.asdict(args).items()
            if isinstance(value, int | float) and key != "workers"
        ),
    }
    try:
        keys = [key for key in KEYS if key != "next_observations" or args.next_observations]
        write(output, [candidates.episodes[e] for e in chosen], keys, attributes)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(
        f"{output}: {len(chosen)} of {len(candidates.episodes)} episodes, return "
        f"{totals[1][chosen].min():.0f} to {totals[1][chosen].max():.0f}, cost "
        f"{totals[0][chosen].min():.0f} to {totals[0][chosen].max():.0f}, "
        f"{time.time() - started:.0f} s; python common/card.py shows it"
    )


if __name__ == "__main__":
    run_main(main)

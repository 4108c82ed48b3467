"""Make an offline dataset with PPO-Lagrangian experts, as DSRL's were made.

    python common/tools/collect.py BallRun
    python common/tools/collect.py --env-id my_module:MyEnv-v0 --max-cost 50

A few experts learn side by side, each under a cost limit of its own that is swept down and up while
it learns (DSRL, section 4). Every finished episode is a candidate; those beyond the largest cost or
below the smallest return are dropped, the others thinned on a grid of cost x return, so that the
dense corners of the plane do not drown the rest. The file has DSRL's keys, and in its attributes
the settings and the versions it was made with.

    limit          what an episode of this expert may cost for now
    multiplier     lambda >= 0, how much cost weighs against reward: a PI controller's output
                   (Stooke et al. 2020) on mean episode cost minus limit
    advantage      (A_reward / std - lambda A_cost / std) / (1 + lambda), of PPO's clipped loss

M experts are stacked along a leading axis and act in one forward pass; the environments are stepped
by worker processes. Each environment has its own random stream, so that the number of workers
changes no number.
"""

import contextlib
import io
import math
import multiprocessing
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain, zip_longest
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.args import TrainingError, UserError, parse_args, progress_bar, run_main, whole_file
from common.dataset import within
from common.evaluation import GONE, cpu_cores, no_interrupts, start_worker
from common.simulators import check_installed, make, reset, step, to_box
from common.tasks import Task, get_task, infos, reference_returns
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
EPOCHS, BATCH_SIZE = 8, 512  # passes over an iteration's steps; an expert's steps in a minibatch
HIDDEN_SIZE = 64  # units of each of the two hidden layers of actor and critic (PPO's)

KEYS = ("observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts")
Episode = dict[str, np.ndarray]  # arrays [T, ...] by DSRL's keys


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
    """processes that step the environments; default: one a core"""

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
    lr: float = 3e-4
    """learning rate, Adam (PPO's)"""
    std_start: float = 0.6
    """standard deviation of the first actions, in an action box of [-1, 1] (ours)"""
    std_end: float = 0.2
    """of the last ones; it falls geometrically (ours)"""


class Experts(nn.Module):
    """M actors and M critics, tanh, two hidden layers; the critics value reward and cost."""

    def __init__(self, experts: int, observation_dim: int, action_dim: int):
        super().__init__()
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for name, out, gain in (("actor", action_dim, 0.01), ("critic", 2, 1.0)):
            sizes = (observation_dim, HIDDEN_SIZE, HIDDEN_SIZE, out)
            for layer, scale in enumerate((2**0.5, 2**0.5, gain)):
                weight = torch.empty(experts, sizes[layer], sizes[layer + 1])
                for expert in weight:
                    nn.init.orthogonal_(expert, scale)
                self.weights[f"{name}{layer}"] = nn.Parameter(weight)
                self.biases[f"{name}{layer}"] = nn.Parameter(weight.new_zeros(weight[:, :1].shape))

    def forward(self, name: str, observation: Tensor) -> Tensor:
        """Observations [..., M, N, .] -> actor: mean actions, critic: values of reward and cost."""
        hidden = observation
        for layer in range(3):
            key = f"{name}{layer}"
            hidden = hidden @ self.weights[key] + self.biases[key]
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


def serve(pipe: Connection, env_id: str, numbers: list[int], seed: int) -> None:
    """A worker: step some of the environments, n of them, one after the other, as it is told.

    It sends their first observations. Actions [n, action_dim] in [-1, 1] it answers with what to
    act on next, and then by KEYS: what the actions led to, which differs from that where an episode
    has ended, and the actions as they were played, [n, .] each; the others are [n].
    """
    start_worker()
    streams = [np.random.default_rng((seed, number)) for number in numbers]

    def start(i: int) -> np.ndarray:
        return reset(envs[i], streams[i].integers(2**32).item())

    with contextlib.suppress(OSError):  # nobody listens any more
        try:
            envs = [make(env_id) for _ in numbers]
            following = [start(i) for i in range(len(envs))]
            pipe.send([np.array(following)])
            while True:
                told = []
                for i, action in enumerate(to_box(pipe.recv(), envs[0].action_space)):
                    played = np.array(action, np.float32)  # copies: both may be changed in place
                    final, reward, terminated, truncated, cost = step(envs[i], action)
                    scores = np.float32(reward), np.float32(cost), bool(terminated), bool(truncated)
                    told.append((final, played, *scores))
                    following[i] = start(i) if terminated or truncated else final
                pipe.send([np.array(following), *map(np.array, zip(*told, strict=True))])
        except Exception as error:  # the environment may be anybody's
            said = str(error) if isinstance(error, TrainingError) else f"{env_id}: {error!r}"
            pipe.send(TrainingError(said))


def answers(pipes: list[Connection], experts: int, actions: Sequence = ()) -> list[np.ndarray]:
    """What the workers answer to their actions (unasked, at first): arrays [M, n, ...].

    Raises:
        TrainingError: an environment failed, or a worker is gone.
    """
    try:
        for pipe, share in zip(pipes, actions, strict=False):
            pipe.send(share)
        told = [pipe.recv() for pipe in pipes]
    except (EOFError, OSError):
        raise TrainingError(f"a process that steps the environments is gone: {GONE}") from None
    for answer in told:
        if isinstance(answer, TrainingError):
            raise answer
    joined = [np.concatenate(arrays) for arrays in zip(*told, strict=True)]
    return [x.reshape(experts, -1, *x.shape[1:]) for x in joined]


def thin(
    costs: np.ndarray, returns: np.ndarray, keep: int, seed: int, best_within: tuple[float, ...]
) -> np.ndarray:
    """Choose at most ``keep`` of the E episodes, evenly over a grid of cost x return -> indices.

    Every cell keeps the same number, as far as it has so many: its best return first, the others
    at random. The best return within each cost of ``best_within`` is kept in any case: its cell
    may hold a better one that costs more.
    """
    kept = [within(costs, limit) for limit in best_within]
    leaders = [np.where(x, returns, -np.inf).argmax() for x in kept if x.any()]
    edges = [np.linspace(x.min(), x.max(), GRID + 1)[1:-1] for x in (costs, returns)]
    cell = np.digitize(costs, edges[0]) * GRID + np.digitize(returns, edges[1])
    cells: dict[int, list[int]] = {}
    for e in np.random.default_rng(seed).permutation(len(cell)):
        cells.setdefault(cell[e], []).append(e)
    for members in cells.values():
        members.insert(0, members.pop(returns[members].argmax()))
    in_turn = chain.from_iterable(zip_longest(*cells.values()))  # one of each cell, again and again
    chosen = dict.fromkeys(e for e in (*leaders, *in_turn) if e is not None)
    return np.sort(list(chosen)[:keep])


def train(args: Args, task: Task, max_cost: float, iterations: int) -> Iterator[list[Episode]]:
    """Train the experts; after each step of all environments, yield the episodes that it ended.

    Raises:
        TrainingError: an environment failed, a worker is gone, or an expert has diverged.
    """
    spawn, pipes = multiprocessing.get_context("spawn"), []
    for share in np.array_split(np.arange(args.envs), min(args.workers or cpu_cores(), args.envs)):
        ours, theirs = spawn.Pipe()
        arguments = (theirs, task.env_id, share.tolist(), args.seed)
        with no_interrupts():
            spawn.Process(target=serve, args=arguments, daemon=True).start()
        theirs.close()
        pipes.append(ours)

    torch.set_num_threads(1)  # the workers need the cores, and sums keep their order
    torch.manual_seed(args.seed)
    n = args.envs // args.experts
    experts = Experts(args.experts, task.observation_dim, task.action_dim)
    optimizer = torch.optim.Adam(experts.parameters(), lr=args.lr, fused=True)
    rows = []  # what each step brought, [M, n, ...] each
    began = np.zeros((args.experts, n), int)  # the row that an episode began in

    # running moments: of observations, shared by all experts; of values, [M, 1, 2]
    count, mean, variance = 1e-4, np.zeros(task.observation_dim), np.ones(task.observation_dim)
    value_mean, value_std = torch.zeros(args.experts, 1, 2), torch.ones(args.experts, 1, 2)
    integral = np.zeros(args.experts)
    mean_cost = limits_at(0.0, args.experts, args, max_cost)  # of the latest episodes

    def normal(observations: np.ndarray) -> Tensor:
        """Scale each dimension to mean 0 and deviation 1."""
        scaled = ((observations - mean) / np.sqrt(variance + 1e-8)).clip(-10, 10)
        return torch.from_numpy(np.float32(scaled))

    (observations,) = answers(pipes, args.experts)
    for iteration in range(iterations):
        progress = iteration / iterations
        limit = limits_at(progress, args.experts, args, max_cost)
        std = args.std_start * (args.std_end / args.std_start) ** progress

        # 1. act, with noise
        spent = [[] for _ in range(args.experts)]  # costs of the episodes that end
        for _ in range(args.rollout):
            with torch.no_grad():
                action = experts("actor", normal(observations))  # [M, n, action_dim]
                action += std * torch.randn(action.shape)
            if not action.isfinite().all():
                raise TrainingError(f"an expert has diverged by iteration {iteration}; lower --lr")
            shares = np.array_split(action.numpy().reshape(args.envs, -1), len(pipes))
            following, *told, terminated, timed_out = answers(pipes, args.experts, shares)
            rows.append((observations, *told, terminated, timed_out, action.numpy()))
            observations, finished = following, []
            for m, i in np.argwhere(terminated | timed_out):
                steps = [[x[m, i] for x in row] for row in rows[began[m, i] :]]
                by_key = zip(KEYS, zip(*steps, strict=True), strict=False)  # without what was drawn
                finished.append({key: np.array(x) for key, x in by_key})
                spent[m].append(finished[-1]["costs"].sum())
                began[m, i] = len(rows)
            yield finished
        arrays = map(np.stack, zip(*rows[-args.rollout :], strict=True))
        seen, after, _, rewards, costs, terminals, timeouts, drawn = arrays  # [T, M, n, ...] each
        rows, began = rows[began.min() :], began - began.min()

        # 2. the multipliers
        for m, totals in enumerate(spent):
            if totals:
                mean_cost[m] += min(1, len(totals) / n) * (np.mean(totals) - mean_cost[m])
        excess = (mean_cost - limit) / max_cost
        integral = (integral + MULTIPLIER_I * excess).clip(0, MULTIPLIER_MAX)
        multiplier = (integral + MULTIPLIER_P * excess).clip(0, MULTIPLIER_MAX)

        # 3. advantages
        observation, action = normal(seen), torch.from_numpy(drawn)
        scores = torch.from_numpy(np.stack((rewards, costs), -1))
        ends = np.float32((terminals, terminals | timeouts))[..., None]
        with torch.no_grad():
            old = log_prob(experts("actor", observation), std, action)
            value = experts("critic", observation) * value_std + value_mean
            next_value = experts("critic", normal(after)) * value_std + value_mean
            gains = generalised_advantage(scores, value, next_value, *torch.from_numpy(ends))
            observation, action, old, value, gains = (
                x.movedim(0, 1).flatten(1, 2) for x in (observation, action, old, value, gains)
            )  # [M, T * n, ...] each
            target = value + gains
            advantage = lagrangian_advantage(gains, torch.from_numpy(np.float32(multiplier)))
            # The critics' outputs have mean 0 and deviation 1; when those moments move, the last
            # layer moves with them and no value changes (PopArt, van Hasselt et al. 2016).
            rate = 1.0 if iteration == 0 else 0.1
            new_mean = value_mean + rate * (target.mean(1, keepdim=True) - value_mean)
            new_std = value_std + rate * (target.std(1, keepdim=True) + 1e-3 - value_std)
            weight, bias = experts.weights["critic2"], experts.biases["critic2"]
            bias.copy_((bias * value_std + value_mean - new_mean) / new_std)
            weight.mul_(value_std / new_std)
            value_mean, value_std = new_mean, new_std
            target = (target - value_mean) / value_std

        # 4. PPO
        for _ in range(EPOCHS):
            shuffled = torch.randperm(args.rollout * n)
            for batch in shuffled.split(BATCH_SIZE):
                new = log_prob(experts("actor", observation[:, batch]), std, action[:, batch])
                actor = ppo_loss(new, old[:, batch], advantage[:, batch])  # [M]
                error = experts("critic", observation[:, batch]) - target[:, batch]
                loss = (actor + 0.5 * error.square().mean((1, 2))).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        # 5. moments of the observations (Chan et al. 1979)
        seen = np.float64(seen).reshape(-1, task.observation_dim)
        count += len(seen)
        weight, shift = len(seen) / count, seen.mean(0) - mean
        variance += weight * (seen.var(0) - variance + (1 - weight) * shift**2)
        mean += weight * shift


def main() -> None:
    args = parse_args(Args, at_least={"seed": 0, "min_return": -math.inf})
    if args.envs % args.experts:
        raise UserError(f"--envs {args.envs}: must be a multiple of --experts {args.experts}")
    if args.std_start <= 0 or args.std_end <= 0:
        raise UserError("--std-start and --std-end must be above 0")
    task = get_task(args.task, args.env_id)
    max_cost, min_return, keep = 0.0, -math.inf, 1000
    if task.suite != "own":  # what DSRL's own file has
        max_cost, (min_return, _) = infos().MAX_EPISODE_COST[task.name], reference_returns(task)
        keep = int(task.dsrl_file.removesuffix(".hdf5").split("-")[-1])
    max_cost = max_cost if args.max_cost is None else args.max_cost
    if not max_cost:
        raise UserError(f"--max-cost: say how much an episode of {task.name} may cost, above 0")
    min_return = min_return if args.min_return is None else args.min_return
    output = args.output or Path(f"Safety{task.name}.hdf5")
    check_output(output)
    check_installed()

    failure = ""
    candidates: list[tuple[float, float, Episode]] = []  # cost, return, and what was played
    iterations = -(-args.steps // (args.rollout * args.envs))
    steps = train(args, task, max_cost, iterations)
    bar = progress_bar(iterable=steps, total=iterations * args.rollout)
    try:
        for episode in chain.from_iterable(bar):
            cost, total = (episode[key].sum(dtype=np.float64) for key in ("costs", "rewards"))
            if within(cost, max_cost) and total >= min_return:
                candidates.append((cost, total, episode))
                bar.set_postfix(candidates=len(candidates), refresh=False)
    except TrainingError as error:
        failure = str(error)
    if not candidates:
        raise TrainingError(failure or "no episode is kept; give more --max-cost or --steps")
    costs, returns = np.array([(cost, total) for cost, total, _ in candidates]).T
    chosen = thin(costs, returns, args.episodes or keep, args.seed, args.best_within)
    packages = ("torch", "numpy", "gymnasium", "dsrl", "bullet-safety-gym", "safety-gymnasium")
    attributes = {
        "provenance": "PPO-Lagrangian experts, thinned; made by common/tools/collect.py of PreSa",
        "environment": task.env_id,
        "versions": ", ".join(f"{p} {version(p).partition('+')[0]}" for p in packages),
        "settings": str(replace(args, output=None, workers=None)),  # which change no number
    }
    buffer = io.BytesIO()  # HDF5 itself crashes on a full disk
    with h5py.File(buffer, "w") as file:
        for key in KEYS:
            if args.next_observations or key != "next_observations":
                array = np.concatenate([candidates[e][2][key] for e in chosen])
                file.create_dataset(key, data=array, compression=9, shuffle=True)  # gzip's best
        for name, text in attributes.items():  # a file's name may be any bytes
            file.attrs[name] = text.encode(errors="backslashreplace").decode()
    with whole_file(output) as part:
        part.write_bytes(buffer.getbuffer())
    which = ["--env-id", args.env_id] if args.env_id else [task.name]
    card = shlex.join(["python", "common/tools/card.py", *which, "--data", str(output)])
    print(f"{output}: {len(chosen)} of {len(candidates)} episodes; {card} shows it", flush=True)
    if failure:
        raise TrainingError(f"{failure}; what was collected is in {output}")


if __name__ == "__main__":
    run_main(main)

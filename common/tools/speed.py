"""How fast training and evaluation are, against the usual way and against the machine's floor.

    python tests/bench.py                 # all of it, some minutes on two idle cores
    python tests/bench.py --parts step evaluation --rounds 5

Ratios are taken within a round, what is compared alternating, and the median over the rounds is
shown: another program on the machine then disturbs both sides alike. It measures the scripts
themselves, their ``main`` as a user runs it, by the times at which steps are logged.
"""

import contextlib
import itertools
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from algorithms import bc_all, cdt, presa
from common.cli import check_numbers, cpu_cores, get_device, parse_args, run_main
from common.dataset import Dataset, load_dataset
from common.evaluation import EPISODES_PER_UNIT, Evaluator, play
from common.feedback import make_feedback
from common.gpu import captured
from common.simulators import import_gymnasium, make
from common.tasks import get_task, reference_returns, segment_length

T = TypeVar("T")
TASK = get_task("BallRun")
PARTS = ("step", "scaling", "settings", "bc", "cdt", "evaluation", "start")


@dataclass
class Args:
    """Measure the speed of training and evaluation on the bundled BallRun data."""

    parts: tuple[Literal[PARTS], ...] = PARTS
    """what to measure"""
    rounds: int = 3
    """times that everything is measured, alternating"""
    steps: int = 40
    """gradient steps in a measurement"""
    device: str = "auto"
    """auto (a GPU where there is one) | cpu | cuda"""


class Clock:
    """In place of a run: it writes nothing and notes when each step was logged."""

    times: ClassVar[dict[str, list[float]]] = {}

    def __init__(self, *args, **kwargs):
        Clock.times = {}
        self.config, self.last = {}, {"violation": np.zeros(1)}

    def log(self, stage: str, step: int, metrics: dict) -> None:
        if torch.cuda.is_available():
            next(iter(metrics.values())).sum().item()  # wait for the device
        Clock.times.setdefault(stage, []).append(time.perf_counter())

    def steps(self, stage: str, first: int, last: int, *others, **more) -> range:
        return range(first, last + 1)

    def evaluate(self, *args) -> None: ...

    def finish(self, *args, **kwargs) -> None: ...


def script_step(module, stage: str, flags: str) -> float:
    """Seconds a gradient step of a script takes, the median of those after the first few."""
    real, argv = module.Run, sys.argv
    module.Run, sys.argv = Clock, ["bench", "--data", "bundled", *flags.split()]
    try:
        module.main()
    finally:
        module.Run, sys.argv = real, argv
    return statistics.median(np.diff(Clock.times[stage])[3:])


def timed(step: Callable[[], None], steps: int) -> float:
    """Seconds a call takes, the median of those after the first few."""
    taken = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[3:])


# ------------------------------------------------------------------------- the usual way to do it


def usual_policy(device: torch.device) -> nn.Module:
    """One policy, out of torch's own layers."""
    parts = [nn.Linear(TASK.observation_dim, 256), nn.ReLU(), nn.Dropout(0.25)]
    parts += [nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.25)]
    return nn.Sequential(*parts, nn.Linear(256, TASK.action_dim), nn.Tanh()).to(device)


def usual_presa(dataset: Dataset, runs: int, device: torch.device) -> Callable[[], None]:
    """A step of PreSa as ``runs`` separate networks, each with a batch collected on the host.

    The reference's log-probabilities are kept here too, so that what differs is the way, not the
    work.
    """
    length = segment_length(TASK.horizon, TASK.cost_limits)
    feedback = make_feedback(dataset, TASK, (0,), (20.0,), length, 10_000)
    starts, label, has_preference = (x[0].numpy() for x in feedback.tensors(torch.device("cpu")))
    weight = presa.class_weights(torch.from_numpy(label[0]), 0.1).numpy()
    reference = -np.random.default_rng(0).random(len(dataset.rewards), np.float32)
    policies = [usual_policy(device) for _ in range(runs)]
    optimizers = [torch.optim.Adam(policy.parameters(), lr=1e-4) for policy in policies]
    multipliers = [torch.ones((), device=device) for _ in range(runs)]
    args, rng = presa.Args(), np.random.default_rng(0)

    def step() -> None:
        for r, (policy, optimizer) in enumerate(zip(policies, optimizers, strict=True)):
            pairs = rng.integers(len(starts), size=args.batch_size)
            steps = starts[pairs][..., None] + np.arange(length)
            host = dataset.observations[steps], dataset.actions[steps], reference[steps]
            host = (*host, label[0, pairs], weight[pairs], has_preference[0, pairs])
            s, a, ref, y, w, known = (torch.from_numpy(x).to(device) for x in host)
            score = presa.segment_score(presa.log_prob(policy(s), a), ref, args.gamma)
            loss, metrics = presa.presa_loss(score, (y, w, known), multipliers[r], args)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            multipliers[r] = (multipliers[r] + args.nu_lr * metrics["violation"]).clamp(min=0)

    return step


def products(runs: int, device: torch.device) -> Callable[[], None]:
    """The matrix products of a step of PreSa, forward and backward, and nothing else."""
    rows = presa.Args().batch_size * 2 * segment_length(TASK.horizon, TASK.cost_limits)
    sizes = (TASK.observation_dim, 256, 256, TASK.action_dim)
    inputs = [torch.randn(runs, rows, n, device=device) for n in sizes]
    weights = [torch.randn(runs, sizes[i], sizes[i + 1], device=device) for i in range(3)]

    def step() -> dict:
        for i in range(3):
            torch.bmm(inputs[i], weights[i])
        for i in reversed(range(3)):
            torch.bmm(inputs[i].mT, inputs[i + 1])  # the weight's gradient
            if i:
                torch.bmm(inputs[i + 1], weights[i].mT)  # the input's
        return {}

    none = torch.optim.SGD(weights)
    return captured(step, none, [], enabled=device.type == "cuda")


class Transitions(torch.utils.data.IterableDataset):
    """Single transitions at random, all six arrays of each, as the field's loader does (OSRL)."""

    def __init__(self, dataset: Dataset):
        following = np.roll(dataset.observations, -1, 0)
        done = np.zeros(len(following), np.float32)
        done[dataset.episode_ends - 1] = 1
        self.arrays = dataset.observations, following, dataset.actions, dataset.rewards
        self.arrays += dataset.costs, done

    def __iter__(self) -> Iterator[tuple]:
        while True:
            t = np.random.choice(len(self.arrays[0]))
            yield tuple(x[t] for x in self.arrays)


def usual_bc(data: torch.utils.data.Dataset, actions: int, device: torch.device) -> Callable:
    """A step of behaviour cloning fed by torch's data loader, one transition after the other.

    ``actions`` is the place of the actions in what ``data`` yields.
    """
    drawn = isinstance(data, torch.utils.data.IterableDataset)
    more = {} if drawn else {"shuffle": True, "drop_last": True}
    loader = torch.utils.data.DataLoader(data, batch_size=512, **more)
    policy = usual_policy(device)
    batches = (batch for _ in itertools.count() for batch in loader)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)

    def step() -> None:
        batch = [x.to(device) for x in next(batches)]
        loss = (policy(batch[0]) - batch[actions]).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class UsualBlock(nn.Module):
    """A transformer block out of torch's own layers, with the mask given as a matrix."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, 0.1, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen = self.norm1(x)
        x = x + self.attention(seen, seen, seen, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class UsualTransformer(nn.Module):
    """CDT's transformer out of torch's own layers."""

    def __init__(self):
        super().__init__()
        args, width = cdt.Args(), cdt.Args().width
        sizes = (1, 1, TASK.observation_dim, TASK.action_dim)
        self.embed = nn.ModuleList(nn.Linear(n, width) for n in sizes)
        self.embed_time = nn.Embedding(TASK.horizon, width)
        self.blocks = nn.ModuleList(UsualBlock(width, args.heads) for _ in range(args.layers))
        self.first_norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(args.dropout)
        self.heads = nn.ModuleList(
            nn.Linear(width, n) for n in (TASK.action_dim, TASK.action_dim, 1)
        )

    def forward(self, tokens: list[torch.Tensor], when: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Four tokens [B, K, .] and steps [B, K] -> mean, log-deviation, cost's logit [B, K, .]."""
        batch, steps = when.shape
        mask = torch.ones(4 * steps, 4 * steps, dtype=torch.bool, device=when.device).triu(1)
        parts = [e(x) + self.embed_time(when) for e, x in zip(self.embed, tokens, strict=True)]
        x = self.dropout(self.first_norm(torch.stack(parts, 2).flatten(1, 2)))
        for block in self.blocks:
            x = block(x, mask)
        x = self.last_norm(x).view(batch, steps, 4, -1)
        mean, log_std, cost = (
            head(x[:, :, i]) for head, i in zip(self.heads, (2, 2, 3), strict=True)
        )
        return mean, -1.5 + 3.5 * torch.tanh(log_std), cost[..., 0]


class UsualActor:
    """Play one episode with it, as a Decision Transformer's evaluation is usually written."""

    def __init__(self, model: UsualTransformer):
        self.model, self.togo = model.eval(), torch.tensor([50.0, 20.0])
        self.history: list[list[torch.Tensor]] = []

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Observations [1, .] -> actions [1, .]."""
        unknown = torch.zeros(1, TASK.action_dim)
        step = [self.togo[:1], self.togo[1:], torch.from_numpy(observations)[0], unknown[0]]
        self.history.append(step)
        known = self.history[-cdt.Args().context :]
        tokens = [torch.stack(x)[None] for x in zip(*known, strict=True)]
        when = torch.arange(len(self.history))[-len(known) :][None]
        action = self.model(tokens, when)[0][:, -1]
        step[3] = action[0]
        return action.numpy()

    def observe(self, rewards: np.ndarray, costs: np.ndarray) -> None:
        """What the step brought, [1] each."""
        self.togo = self.togo - torch.tensor([0.1 * rewards[0], costs[0]], dtype=torch.float32)


def usual_cdt(dataset: Dataset, batch_size: int, device: torch.device) -> Callable[[], None]:
    """An update of CDT on sequences that are cut out and stacked one by one on the host."""
    args, steps, model = cdt.Args(), cdt.Args().context, UsualTransformer().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    rng, log_temperature = np.random.default_rng(0), torch.zeros(1, device=device)
    lengths = dataset.episode_ends - dataset.episode_starts
    togo = [dataset.to_go(x)[:, None] for x in (dataset.rewards, dataset.costs)]
    arrays = [*togo, dataset.observations, dataset.actions, (dataset.costs > 0)[:, None]]

    def sequence() -> list[np.ndarray]:
        e = rng.integers(len(lengths))
        first = rng.integers(lengths[e])
        real = min(steps, lengths[e] - first)
        t = dataset.episode_starts[e] + first
        cut = [np.pad(np.float32(x[t : t + real]), ((0, steps - real), (0, 0))) for x in arrays]
        return [*cut, np.arange(steps) < real, np.minimum(first + np.arange(steps), 99)]

    def step() -> None:
        stacked = [np.stack(x) for x in zip(*(sequence() for _ in range(batch_size)), strict=True)]
        *tokens, costs, valid, when = (torch.from_numpy(x).to(device) for x in stacked)
        many = [y[None] for y in (*model(tokens, when), tokens[3], costs[..., 0], valid.float())]
        loss, _ = cdt.cdt_loss(tuple(many[:3]), *many[3:], log_temperature, args.cost_weight)
        optimizer.zero_grad()
        loss.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()

    return step


# ------------------------------------------------------------------------------------ the parts


def show(title: str, rows: list[tuple[str, list[float], str, list[float] | None]]) -> None:
    """Print the median of each row's values, and of its ratio to another row's."""
    print(f"\n{title}")
    for name, values, unit, other in rows:
        ratio = ""
        if other is not None:
            ratio = f"{statistics.median(a / b for a, b in zip(values, other, strict=True)):8.2f} x"
        print(f"  {name:<58}{statistics.median(values):10.2f} {unit:<10}{ratio}")


def alternating(args: Args, measures: dict[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Every measure once a round."""
    taken: dict[str, list[T]] = {name: [] for name in measures}
    for _ in range(args.rounds):
        for name, measure in measures.items():
            taken[name].append(measure())
    return taken


def short_run(args: Args, seeds: int = 1) -> str:
    """Flags of a run with as many steps as a measurement has; on a GPU they are captured."""
    chosen = " ".join(map(str, range(seeds)))
    how = " --cudagraphs" if get_device(args.device).type == "cuda" else ""
    return f"--seeds {chosen} --steps {args.steps} --device {args.device}{how}"


def flags(args: Args, seeds: int, limits: str = "10 20 40") -> str:
    """Of PreSa: such a run's alignment."""
    return f"{short_run(args, seeds)} --cost-limits {limits} --bc-steps 1"


def bench_step(args: Args, dataset: Dataset, device: torch.device) -> None:
    """PreSa's step for one and for nine runs, the usual way, and its products alone."""
    for runs, chosen in ((1, flags(args, 1, "20")), (9, flags(args, 3))):
        usual, bare = usual_presa(dataset, runs, device), products(runs, device)
        taken = alternating(
            args,
            {
                "presa.py": lambda chosen=chosen: 1e3 * script_step(presa, "align", chosen),
                "usual": lambda usual=usual: 1e3 * timed(usual, args.steps),
                "bare": lambda bare=bare: 1e3 * timed(bare, args.steps),
            },
        )
        show(
            f"PreSa, a gradient step, R = {runs}",
            [
                ("presa.py", taken["presa.py"], "ms", None),
                ("its bare matrix products", taken["bare"], "ms", None),
                ("  presa.py over these", taken["presa.py"], "ms", taken["bare"]),
                ("separate networks, batches from the host", taken["usual"], "ms", None),
                ("  these over presa.py", taken["usual"], "ms", taken["presa.py"]),
            ],
        )


def bench_scaling(args: Args, dataset: Dataset, device: torch.device) -> None:
    """How the cost of a step grows with the number of runs."""
    sizes = {1: (1, "20"), 3: (1, "10 20 40"), 9: (3, "10 20 40"), 27: (9, "10 20 40")}
    measures = {
        str(runs): lambda chosen=chosen: 1e3 * script_step(presa, "align", flags(args, *chosen))
        for runs, chosen in sizes.items()
    }
    taken = alternating(args, measures)
    show(
        "PreSa, a gradient step of R runs at once (x: of R = 1)",
        [(f"R = {runs}", taken[str(runs)], "ms", taken["1"]) for runs in sizes],
    )


def presa_step(flags: str, threads: int, compiled: bool) -> tuple[float, float]:
    """Seconds a step of PreSa takes, and until its first one is done, in a worker."""
    torch.set_num_threads(threads)
    if compiled:
        presa.captured = lambda update, *others: torch.compile(update)
    started = time.perf_counter()
    median = script_step(presa, "align", flags)
    return median, Clock.times["align"][0] - started


def bench_settings(args: Args, dataset: Dataset, device: torch.device) -> None:
    """Other ways to run PreSa's step of nine runs on a CPU."""
    ways = {
        "eager, as the script is": (cpu_cores(), False),
        "eager, one thread": (1, False),
        "torch.compile of the step": (cpu_cores(), True),
    }
    context, chosen = multiprocessing.get_context("spawn"), flags(args, 3)

    def in_a_worker(threads: int, compiled: bool) -> tuple[float, float]:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(presa_step, chosen, threads, compiled).result()

    measures = {name: lambda way=way: in_a_worker(*way) for name, way in ways.items()}
    taken = alternating(args, measures)
    steps = {name: [1e3 * step for step, _ in both] for name, both in taken.items()}
    started = {name: [start for _, start in both] for name, both in taken.items()}
    rows = [(name, steps[name], "ms", steps["eager, as the script is"]) for name in ways]
    rows += [(f"  first step, {name}", started[name], "s", None) for name in ways]
    show("PreSa, a gradient step of R = 9 on a CPU, other ways (x: of the script's)", rows)


def bench_bc(args: Args, dataset: Dataset, device: torch.device) -> None:
    """Behaviour cloning, one policy, against a data loader: the field's, and a leaner one."""
    read = map(torch.from_numpy, (dataset.observations, dataset.actions))
    pairs = usual_bc(torch.utils.data.TensorDataset(*read), 1, device)
    usual = usual_bc(Transitions(dataset), 2, device)
    chosen = short_run(args)
    taken = alternating(
        args,
        {
            "ours": lambda: 1e3 * script_step(bc_all, "bc", chosen),
            "usual": lambda: 1e3 * timed(usual, args.steps),
            "pairs": lambda: 1e3 * timed(pairs, args.steps),
        },
    )
    show(
        "BC, a whole step of 512 transitions, R = 1",
        [
            ("bc_all.py", taken["ours"], "ms", None),
            ("with a data loader, six arrays a transition (as OSRL)", taken["usual"], "ms", None),
            ("  this over bc_all.py", taken["usual"], "ms", taken["ours"]),
            ("with a data loader, observation and action alone", taken["pairs"], "ms", None),
            ("  this over bc_all.py", taken["pairs"], "ms", taken["ours"]),
        ],
    )


def cdt_rate(episodes: int, usual: bool = False) -> float:
    """Steps a second of so many episodes of CDT played at once, on one core, in a worker.

    ``usual``: by a transformer of torch's own layers, which plays one.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    import_gymnasium()
    config = {"heads": 8, "context": 10, "reward_scale": 0.1}
    parameters, layers = cdt.init_parameters(0, TASK, cdt.Args()), UsualTransformer()
    targets = np.tile([500.0, 20.0], (episodes, 1))

    def play_once() -> None:
        act = UsualActor(layers) if usual else cdt.load_policy(config, parameters, targets)
        play(TASK, act, list(range(episodes)))

    play_once()  # the environments are there
    started, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < 2:
        play_once()
        count += episodes * TASK.horizon
    return count / taken


def bench_cdt(args: Args, dataset: Dataset, device: torch.device) -> None:
    """CDT's update and its evaluation, against torch's layers."""
    usual, few = usual_cdt(dataset, 128, device), max(6, args.steps // 4)
    many = EPISODES_PER_UNIT * len(TASK.cost_limits)  # as the scripts do
    chosen = f"--seeds 0 --steps {few} --batch-size 128 --device {args.device}"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        taken = alternating(
            args,
            {
                "ours": lambda: 1e3 * script_step(cdt, "cdt", chosen),
                "usual": lambda: 1e3 * timed(usual, few),
                "many": lambda: pool.submit(cdt_rate, many).result(),
                "one": lambda: pool.submit(cdt_rate, 1).result(),
                "layers": lambda: pool.submit(cdt_rate, 1, True).result(),
            },
        )
    show(
        "CDT, an update of 128 sequences, R = 1; evaluation on one core",
        [
            ("cdt.py", taken["ours"], "ms", None),
            ("torch's layers, sequences stacked one by one", taken["usual"], "ms", None),
            ("  this over cdt.py", taken["usual"], "ms", taken["ours"]),
            (f"evaluation, {many} episodes at once", taken["many"], "steps/s", None),
            ("evaluation, one episode at a time", taken["one"], "steps/s", None),
            (f"  {many} over one", taken["many"], "steps/s", taken["one"]),
            ("evaluation, torch's layers, one at a time", taken["layers"], "steps/s", None),
            (f"  {many} over this", taken["many"], "steps/s", taken["layers"]),
        ],
    )


def bare_simulator(seconds: float) -> float:
    """Steps a second of one environment with random actions, in a worker."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import_gymnasium()
    env, rng, count = make(TASK.env_id), np.random.default_rng(0), 0
    env.reset(seed=0)
    actions = rng.uniform(-1, 1, (1000, TASK.action_dim)).astype(np.float32)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            count += 1
            if terminated or truncated:
                env.reset()
    return count / (time.perf_counter() - started)


def bench_evaluation(args: Args, dataset: Dataset, device: torch.device) -> None:
    """Nine policies of PreSa, twenty episodes each, on all cores, against the bare simulator."""
    cores, spawn = cpu_cores(), multiprocessing.get_context("spawn")
    evaluator = Evaluator(TASK, "algorithms/presa.py", 20, 9, reference_returns(TASK))
    policies = [presa.Policy(TASK.observation_dim, TASK.action_dim, 256) for _ in range(9)]
    parameters = {
        name: torch.stack([p.state_dict()[name] for p in policies]).unflatten(0, (3, 3))
        for name in policies[0].state_dict()
    }
    evaluator.evaluate({}, parameters, (0, 1, 2), 3)  # the workers are up

    def ours() -> float:
        started = time.perf_counter()
        evaluator.evaluate({}, parameters, (0, 1, 2), 3)
        return 9 * 20 * TASK.horizon / (time.perf_counter() - started)

    with ProcessPoolExecutor(cores, mp_context=spawn) as pool:
        bare = lambda: sum(pool.map(bare_simulator, [3.0] * cores))  # noqa: E731
        taken = alternating(args, {"ours": ours, "bare": bare})
    evaluator.close()
    show(
        f"Evaluation of nine policies on {cores} cores",
        [
            ("environment steps", taken["ours"], "steps/s", None),
            ("the bare simulator, random actions", taken["bare"], "steps/s", None),
            ("  ours over it", taken["ours"], "steps/s", taken["bare"]),
        ],
    )


FIRST_STEP = """
import resource, sys, time
root, where, device = sys.argv[1:]
sys.path.insert(0, root)
sys.argv = ["presa.py", "--data", "bundled", "--output-dir", where, "--device", device]
from algorithms import presa
def log(run, stage, step, metrics):
    print("first step", time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    run._end()
    sys.exit()
presa.Run.log = log
presa.main()
"""


def bench_start(args: Args, dataset: Dataset, device: torch.device) -> None:
    """From the start of the process to its first gradient step, and the memory of a run."""

    def first_step() -> float:
        with tempfile.TemporaryDirectory() as where:
            command = [sys.executable, "-c", FIRST_STEP, ROOT, where, args.device]
            started = time.time()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("first step")]
        when, memory = map(float, line.split()[2:])
        peak.append(memory)
        return when - started

    peak: list[float] = []
    taken = alternating(args, {"start": first_step})
    rows = [
        ("process start to the first gradient step, bundled data", taken["start"], "s", None),
        ("peak memory of the process then", peak, "MiB", None),
    ]
    show("PreSa's start", rows)


def main() -> None:
    args = parse_args(Args)
    check_numbers(args, {"steps": 8})
    device = get_device(args.device)
    dataset = load_dataset(TASK, "bundled")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        name = name if device.type == "cuda" else models[0]
    print(f"{device.type}: {name}, {cpu_cores()} cores, torch {torch.__version__}")
    for part in args.parts:
        if part == "settings" and device.type == "cuda":
            continue
        globals()[f"bench_{part}"](args, dataset, device)


if __name__ == "__main__":
    run_main(main)

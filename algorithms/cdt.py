"""CDT: the Constrained Decision Transformer, in one file.

    python algorithms/cdt.py --task BallRun --seeds 0 1 2
    python algorithms/cdt.py --steps 1000 --batch-size 64 --lr 1e-3 --warmup 100     # on a CPU

Offline safe RL with the truth at hand, the reward and the cost of every step (Liu et al. 2023). A
causal transformer reads the last K steps as tokens, four a step,

    R_1 C_1 s_1 a_1   R_2 C_2 s_2 a_2   ...   R_K C_K s_K a_K

where R_t is the return still to come and C_t the cost still to come, and is trained to say what was
done: a_t from everything up to s_t. To act, it is told which return and cost to aim at. One model a
seed serves every cost limit.

    min_theta  E[-log pi(a_t | .. R_t C_t s_t) - T H(pi)] + w E[-log p(1[c_t > 0] | .. a_t)]

    paper          here                    meaning
    R_t, C_t       target_to_go            sums of r_t' (times reward_scale) and c_t' over t' >= t
    T              temperature             weight of the entropy H, learned so that H is about -|A|
    w              cost_weight             of the auxiliary prediction of the step's cost
    K              context                 steps that the transformer sees
    kappa          cost_limit              the cost to aim at when it acts

The best trajectories are few and the costly ones many, hence two more pieces of that paper:

- Augmentation: some trajectories are those of the Pareto front, told a higher return and a cost
  that they stay within. Asked for more than it can do at some cost, it shall do its best there.
- Trajectories of low cost are sampled more often.

Where we depart from the authors' code (OSRL):
- Their sampling weight, 70 - cost, never samples a trajectory of cost 70 or more, although the
  largest limit is 80. Ours falls linearly from the cheapest to the costliest and is never 0.
- Their augmentation has constants for each task. Ours: a cost drawn between the data's extremes, a
  return above the front's by up to the standard deviation of the data's returns.
- Dropout on the embeddings and the residual branches, not on the attention weights; costs-to-go as
  they are; the temperature's rate warms up with the others'; bfloat16 in the blocks on a GPU.
- On data other than DSRL's own, the return aimed at is the best of the file's within the limit.

R = seeds are trained at once: every parameter and every batch has a leading axis for them.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.args import OutputArgs, TaskArgs, UserError, get_device, parse_args, run_main
from common.dataset import Dataset, get_cost_limits, load_dataset, within
from common.results import Run
from common.tasks import Task, get_task

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Args(OutputArgs, TaskArgs):
    """CDT: a transformer told which return and which cost to reach."""

    # ---- what it is told
    target_returns: tuple[float, ...] | None = None
    """return aimed at, one for each limit; default: CDT's authors', or the best within the limit"""
    reward_scale: float = 0.1
    """returns-to-go are multiplied by this before they are embedded (CDT)"""

    eval_every: int = 5_000
    """steps between evaluations; the last policy is always evaluated"""

    # ---- which trajectories it sees
    augment: float = 0.2
    """augmented trajectories, as a share of the data's (CDT)"""
    low_cost_weight: float = 10.0
    """how many times as often as the costliest trajectory the cheapest is sampled (ours)"""

    # ---- the transformer
    context: int = 10
    """K, steps that it sees (CDT)"""
    width: int = 128
    """size of a token (CDT)"""
    layers: int = 3
    """blocks of attention and feed-forward (CDT)"""
    heads: int = 8
    """attention heads of each block; they divide --width (CDT)"""
    dropout: float = 0.1
    """probability of dropping a number of an embedding or a residual branch (CDT)"""

    # ---- optimisation
    steps: int = 100_000
    """gradient steps (CDT); meant for a GPU"""
    batch_size: int = 2_048
    """sequences a step (CDT); meant for a GPU"""
    lr: float = 1e-4
    """learning rate, AdamW (CDT)"""
    warmup: int = 500
    """steps over which the learning rate rises from 0 (CDT)"""
    weight_decay: float = 1e-4
    """decoupled weight decay (CDT)"""
    clip: float = 0.25
    """largest norm of a run's gradient (CDT)"""
    cost_weight: float = 0.02
    """weight of the auxiliary loss, the prediction of a step's cost (CDT)"""
    temperature: float = 0.1
    """weight of the policy's entropy at the start; then it is learned (CDT)"""


Params = dict[str, Tensor]  # by name, [R, ...]; those of a linear layer are [R, in, out]
Tokens = tuple[Tensor, ...]  # returns- and costs-to-go, observations, actions, [R, B, K, .] each


def init_parameters(seed: int, task: Task, args: Args) -> Params:
    """One seed's parameters, as GPT's are initialised: normal, deviation 0.02."""
    generator, width = torch.Generator().manual_seed(seed), args.width
    shapes = {"embed_return": (1, width), "embed_cost": (1, width), "cost": (width, 1)}
    shapes |= {"embed_observation": (task.observation_dim, width)}
    shapes |= {"embed_action": (task.action_dim, width)}
    shapes |= dict.fromkeys(("mean", "log_std"), (width, task.action_dim))
    for i in range(args.layers):
        shapes |= {f"qkv{i}": (width, 3 * width), f"project{i}": (width, width)}
        shapes |= {f"up{i}": (width, 4 * width), f"down{i}": (4 * width, width)}
    parameters = {"embed_time": 0.02 * torch.randn(task.horizon, width, generator=generator)}
    for name, (rows, columns) in shapes.items():
        parameters[name] = 0.02 * torch.randn(rows, columns, generator=generator)
        parameters[f"{name}_bias"] = torch.zeros(1, columns)
    for name in ("embed", *(f"{part}{i}" for i in range(args.layers) for part in "ab"), "out"):
        parameters[f"norm_{name}"] = torch.ones(1, width)
        parameters[f"norm_{name}_bias"] = torch.zeros(1, width)
    return parameters


def linear(p: Params, name: str, x: Tensor) -> Tensor:
    """[R, N, in] -> [R, N, out], each run with its own weights."""
    return torch.baddbmm(p[f"{name}_bias"], x, p[name])


def norm(p: Params, name: str, x: Tensor) -> Tensor:
    """Layer norm over the last axis of [R, N, width]."""
    return F.layer_norm(x, x.shape[-1:]) * p[f"norm_{name}"] + p[f"norm_{name}_bias"]


def transformer(
    p: Params, heads: int, tokens: Tokens, time: Tensor, masks: Tensor | None = None, last: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """What each step's action is likely to be, and whether the step costs.

    Causal: what is said of step t does not depend on any token after s_t (its action) or a_t (its
    cost), so whatever pads a sequence at its end changes nothing before.

    time, [R, B, K], counts the steps of the episode; dropout's masks are [R, 1 + 2 layers, B * 4K,
    width], or none. Returns mean and log-deviation of the action [R, B, K, .] and the logit of the
    cost [R, B, K]; where only the last steps are asked for (to act, 1), K is their number.
    """
    r, b, k = time.shape
    width, layers = p["embed_time"].shape[-1], sum(name.startswith("qkv") for name in p) // 2
    time_index = time.reshape(r, -1, 1).expand(-1, -1, width)
    embedded = p["embed_time"].gather(1, time_index)  # [R, B*K, width]
    names = ("embed_return", "embed_cost", "embed_observation", "embed_action")
    parts = [linear(p, n, x.flatten(1, 2)) + embedded for n, x in zip(names, tokens, strict=True)]
    x = torch.stack(parts, 2).view(r, b * k * 4, width)  # R_1 C_1 s_1 a_1 R_2 ...
    drop = [x.new_ones(1, 1, 1)] * (1 + 2 * layers) if masks is None else masks.unbind(1)
    x = norm(p, "embed", x) * drop[0]
    causal_mask = torch.ones(k * 4, k * 4, dtype=torch.bool, device=x.device).tril()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):  # the blocks alone
        for i in range(layers):
            qkv = linear(p, f"qkv{i}", norm(p, f"a{i}", x)).view(r * b, k * 4, 3, heads, -1)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [R*B, heads, 4K, width/heads] each
            if i == layers - 1:  # of what leaves it, only states and actions are read
                read = torch.arange(k * 4, device=x.device).view(k, 4)[-(last or k) :, 2:].flatten()
                x = x.view(r, b, k * 4, width)[:, :, read].flatten(1, 2)
                query, causal_mask = query[:, :, read], causal_mask[read]
            seen = F.scaled_dot_product_attention(query, key, value, causal_mask)
            seen = linear(p, f"project{i}", seen.transpose(1, 2).reshape(x.shape))
            x = x + seen * drop[1 + 2 * i][:, : x.shape[1]]
            hidden = F.gelu(linear(p, f"up{i}", norm(p, f"b{i}", x)))
            x = x + linear(p, f"down{i}", hidden) * drop[2 + 2 * i][:, : x.shape[1]]
    k = last or k
    at_state, at_action = norm(p, "out", x).view(r, b * k, 2, width).unbind(2)
    log_std = -1.5 + 3.5 * torch.tanh(linear(p, "log_std", at_state))  # in [-5, 2]
    mean, cost = linear(p, "mean", at_state), linear(p, "cost", at_action)
    return mean.view(r, b, k, -1), log_std.view(r, b, k, -1), cost.view(r, b, k)


def cdt_loss(
    output: tuple[Tensor, Tensor, Tensor],
    action: Tensor,
    costs: Tensor,
    valid: Tensor,
    log_temperature: Tensor,
    cost_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each run's batch, [R], and what to log, [R] each: means over the valid steps.

    output is the transformer's; action [R, B, K, .], costs [R, B, K] and valid, 0 where the episode
    has ended; log_temperature [R]. The last part moves the temperature alone: it rises while the
    entropy is below -|A|, and falls above (Haarnoja et al. 2018).
    """
    mean, log_std, cost_logit = output
    temperature = log_temperature.exp()

    def over_steps(x: Tensor) -> Tensor:
        return (x * valid).sum((1, 2)) / valid.sum((1, 2))

    deviation = (action - mean) / log_std.exp()
    log_prob = -(0.5 * deviation.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)
    entropy = over_steps((log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1))
    action_loss = over_steps(-log_prob) - temperature.detach() * entropy
    cost_loss = over_steps(F.binary_cross_entropy_with_logits(cost_logit, costs, reduction="none"))
    temperature_loss = temperature * (entropy.detach() + action.shape[-1])
    metrics = {
        "loss": action_loss + cost_weight * cost_loss,
        "action_log_prob": over_steps(log_prob),
        "action_error": over_steps((action - mean).square().sum(-1)),
        "entropy": entropy,
        "temperature": temperature,
        "cost_loss": cost_loss,
        "cost_accuracy": over_steps(((cost_logit > 0) == (costs > 0.5)).float()),
    }
    return metrics["loss"] + temperature_loss, {name: x.detach() for name, x in metrics.items()}


def pareto_front(costs: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """Episodes that no other beats in return at the same cost or less: by rising cost, [F]."""
    order = np.lexsort((-returns, costs))  # by cost, the best return first
    best_before = np.concatenate(([-np.inf], np.maximum.accumulate(returns[order])[:-1]))
    return order[returns[order] > best_before]


def augmented(
    costs: np.ndarray, returns: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Episodes of the front, each told a return above its own and a cost that it stays within.

    Returns the episode [count], and what is added to its returns- and costs-to-go [count, 2].
    """
    front = pareto_front(costs, returns)
    target_cost = rng.uniform(costs.min(), costs.max(), count)
    episode = front[np.searchsorted(costs[front], target_cost, side="right") - 1]
    more_return = rng.uniform(0, returns.std(), count)
    return episode, np.stack((more_return, target_cost - costs[episode]), 1)


def to_go(dataset: Dataset, x: np.ndarray) -> np.ndarray:
    """What is still to come in the episode, this step included, [N] -> [N]."""
    total = np.append(np.cumsum(x[::-1])[::-1], 0)  # to the end of the data
    lengths = dataset.episode_ends - dataset.episode_starts
    return total[:-1] - np.repeat(total[dataset.episode_ends], lengths)


def within_limit(costs: np.ndarray, limit: float) -> np.ndarray:
    """Which episodes cost no more than the limit, [E]; the cheapest tenth where none does."""
    safe = within(costs, limit)
    if not safe.any():
        print(f"note: no episode counts as within {limit:g}; the cheapest tenth stands for them")
        safe = costs <= np.quantile(costs, 0.1)
    return safe


# The returns aimed at under DSRL's three limits, on DSRL's own data (CDT's authors)
RETURN_TARGETS = {
    **dict.fromkeys(("AntRun", "BallCircle", "DroneCircle"), (700.0, 750.0, 800.0)),
    "BallRun": (500.0, 500.0, 700.0),
    "CarRun": (575.0, 575.0, 575.0),
    "DroneRun": (400.0, 500.0, 600.0),
    "AntCircle": (300.0, 350.0, 400.0),
    "CarCircle": (450.0, 500.0, 550.0),
    "CarCircle1": (20.0, 22.5, 25.0),
    "CarCircle2": (20.0, 21.0, 22.0),
    "PointCircle1": (50.0, 52.5, 55.0),
    "PointCircle2": (45.0, 47.5, 50.0),
    **{
        name: (target,) * 3
        for target, names in {
            12.0: ("CarPush2", "PointPush2"),
            15.0: ("CarPush1", "PointPush1"),
            30.0: ("CarGoal2", "PointGoal1", "PointGoal2"),
            35.0: ("CarButton1",),
            40.0: ("CarButton2", "CarGoal1", "PointButton1", "PointButton2"),
            160.0: ("SwimmerVelocity",),
            1750.0: ("HopperVelocity",),
            2800.0: ("AntVelocity", "Walker2dVelocity"),
            3000.0: ("HalfCheetahVelocity",),
        }.items()
        for name in names
    },
}


def get_target_returns(
    task: Task, dataset: Dataset, limits: tuple[float, ...], asked: tuple[float, ...] | None
) -> tuple[float, ...]:
    """The return that a policy is told to reach under each limit.

    Those asked for; else, on DSRL's own data, those of CDT's authors; else the best of the file's
    episodes within the limit, since a fixed number could lie far above what any of them reaches.

    Raises:
        UserError: not one for each limit.
    """
    if asked is not None:
        if len(asked) != len(limits) or not all(map(math.isfinite, asked)):
            raise UserError(f"--target-returns: give {len(limits)} numbers, one for each limit")
        return asked
    known = RETURN_TARGETS.get(task.name) if dataset.source == "dsrl" else None
    targets = dict(zip(task.cost_limits, known, strict=True)) if known else {}
    for limit in limits:
        if limit not in targets:
            within = within_limit(dataset.episode_costs, limit)
            targets[limit] = float(dataset.returns[within].max())
    return tuple(targets[limit] for limit in limits)


def main() -> None:
    args = parse_args(Args)
    if args.width % args.heads:
        raise UserError(f"--heads {args.heads}: must divide --width {args.width}")
    if args.temperature <= 0 or args.low_cost_weight < 1:
        raise UserError("--temperature must be above 0, and --low-cost-weight 1 or more")

    # ---- setup: nothing is written before all input is checked
    task = get_task(args.task, args.env_id)
    device = get_device(args.device)
    dataset = load_dataset(task, args.data)
    limits = get_cost_limits(task, args.cost_limits)
    returns = get_target_returns(task, dataset, limits, args.target_returns)
    inits = [init_parameters(seed, task, args) for seed in args.seeds]
    parameters = {
        name: torch.stack([p[name] for p in inits]).to(device).requires_grad_() for name in inits[0]
    }  # [R, ...] each
    aims = torch.tensor([*zip(returns, limits, strict=True)]).repeat(len(args.seeds), 1)
    run = Run(args, __file__, task, dataset, limits, args.steps)

    def policies() -> Params:
        """A policy for each seed and limit: the seed's model, and what it is told to aim at."""
        models = {name: x.repeat_interleave(len(limits), 0) for name, x in parameters.items()}
        return {**models, "aim": aims}

    first = {name: x[0].detach().cpu() for name, x in policies().items()}
    load_policy(run.config, first)(dataset.observations[:1])  # as evaluation will

    # ---- the data, on the device: sequences are gathered from it by index
    to_come = np.stack((to_go(dataset, dataset.rewards), to_go(dataset, dataset.costs)), 1)
    arrays = (dataset.observations, dataset.actions, dataset.costs > 0, to_come)  # [N, .] each
    observations, actions, costs, to_come = (
        torch.from_numpy(np.float32(x)).to(device) for x in arrays
    )
    total_cost, total_return = dataset.episode_costs, dataset.returns  # [E]
    lengths = dataset.episode_ends - dataset.episode_starts
    entries = []  # the trajectories that each run samples from
    for seed in args.seeds:
        rng = np.random.default_rng(seed)
        extra, added = augmented(total_cost, total_return, round(args.augment * len(lengths)), rng)
        episode = np.append(np.arange(len(lengths)), extra)
        more = np.concatenate((np.zeros((len(lengths), 2)), added))  # is added to its to-go
        cost = total_cost[episode] + more[:, 1]
        share = (cost - cost.min()) / max(np.ptp(cost), 1e-9)  # 0 the cheapest, 1 the costliest
        weight = args.low_cost_weight + (1 - args.low_cost_weight) * share
        chance = np.float32(weight.cumsum() / weight.sum())[:-1]  # that one up to it is sampled
        entries.append((dataset.episode_starts[episode], lengths[episode], more, chance))
    start, length, more, chance = (
        torch.from_numpy(np.stack(x)).to(device) for x in zip(*entries, strict=True)
    )  # [R, M] each
    generators = [torch.Generator(device).manual_seed(seed) for seed in args.seeds]
    each = torch.arange(len(start), device=device)[:, None]  # [R, 1]
    scale = torch.tensor([args.reward_scale, 1.0], device=device)
    log_temperature = torch.full((len(start),), math.log(args.temperature), device=device)
    log_temperature.requires_grad_()
    groups = [{"params": list(parameters.values()), "weight_decay": args.weight_decay}]
    groups += [{"params": [log_temperature], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / args.warmup, 1, args.warmup)

    def draw() -> tuple[Tensor, Tensor]:
        """Numbers in [0, 1), [S, 2, B], and dropout masks, [S, 1 + 2 layers, B * 4K, width]."""
        numbers = [torch.rand(2, args.batch_size, generator=g, device=device) for g in generators]
        shape = (1 + 2 * args.layers, args.batch_size * 4 * args.context, args.width)
        uniform = torch.stack([torch.rand(shape, generator=g, device=device) for g in generators])
        return torch.stack(numbers), uniform.ge_(args.dropout).div_(1 - args.dropout)

    training = {"parameters": parameters, "log_temperature": log_temperature}
    training |= {"optimizer": optimizer, "warmup": warmup, "generators": generators}
    for step in range(run.restore("cdt", training) + 1, args.steps + 1):
        # 1. draw sequences of K steps, some running beyond their episode's end
        numbers, masks = draw()
        which = torch.searchsorted(chance, numbers[:, 0].contiguous())  # by its weight, [R, B]
        place, steps = numbers[:, 1], length[each, which]  # where in it, of how many steps
        time = (place * steps).long()[..., None] + torch.arange(args.context, device=device)
        valid = (time < steps[..., None]).float()  # [R, B, K]
        time = time.clamp(max=task.horizon - 1)
        t = (start[each, which][..., None] + time).clamp(max=len(actions) - 1)
        target_to_go = scale * (to_come[t] + more[each, which][:, :, None]).float()
        tokens = (*target_to_go.split(1, -1), observations[t], actions[t])  # [R, B, K, .] each
        # 2. the loss of every run
        output = transformer(parameters, args.heads, tokens, time, masks)
        loss, metrics = cdt_loss(
            output, actions[t], costs[t], valid, log_temperature, args.cost_weight
        )
        # 3. a step, each run's gradient clipped on its own
        optimizer.zero_grad()
        loss.sum().backward()
        square = sum(p.grad.square().flatten(1).sum(1) for p in parameters.values())  # [R]
        shrink = (args.clip / (square.sqrt() + 1e-6)).clamp(max=1)
        for p in parameters.values():
            p.grad.mul_(shrink.view(-1, *[1] * (p.dim() - 1)))
        optimizer.step()
        warmup.step()
        # 4. log, evaluate, save
        run.log("cdt", step, metrics)
        if step % args.eval_every == 0:
            run.evaluate("cdt", step, policies())
        if step % args.checkpoint_every == 0:
            run.save("cdt", step, training)
    run.finish(policies(), {"target_return": aims[:, 0]})


class Actor:
    """Play n episodes at once, told at each step which return and cost are still to come."""

    def __init__(self, config: dict, parameters: Params):
        self.parameters = {name: p[None] for name, p in parameters.items()}
        self.heads, self.context = config["heads"], config["context"]
        self.scale = torch.tensor([config["reward_scale"], 1.0])
        self.togo = (parameters["aim"] * self.scale)[None]  # [1 or n, 2]
        self.time = 0
        self.history: list[list[Tensor]] = []  # of each of the last K steps, four tokens [n, .]

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Observations [n, .] -> mean actions [n, .]."""
        observation = torch.from_numpy(observations)
        unknown = torch.zeros(len(observation), self.parameters["mean"].shape[-1])
        step = [*self.togo.expand(len(observation), 2).split(1, 1), observation, unknown]
        self.history = [*self.history, step][-self.context :]
        tokens = tuple(torch.stack(x, 1)[None] for x in zip(*self.history, strict=True))
        self.time += 1
        time = torch.arange(self.time)[-len(self.history) :].expand(1, len(observation), -1)
        with torch.no_grad():
            mean = transformer(self.parameters, self.heads, tokens, time, last=1)[0][0, :, 0]
        self.history[-1][3] = mean.clamp(-1, 1)
        return mean.numpy()

    def observe(self, rewards: np.ndarray, costs: np.ndarray) -> None:
        """What the step brought, [n] each: so much less is still to come."""
        self.togo = self.togo - torch.from_numpy(np.float32([rewards, costs])).T * self.scale


def load_policy(config: dict, parameters: Params) -> Actor:
    """Rebuild one policy for evaluation: observations [n, .] -> actions [n, .], dropout off."""
    return Actor(config, parameters)


if __name__ == "__main__":
    run_main(main)

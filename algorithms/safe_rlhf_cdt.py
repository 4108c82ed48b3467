"""Safe-RLHF (CDT): learn reward and cost from feedback, then CDT on them, in one file.

    python algorithms/safe_rlhf_cdt.py --task BallRun --seeds 0 1 2
    python algorithms/safe_rlhf_cdt.py --task BallRun --cost-feedback labels      # Table 9

The usual way from feedback to a policy, which PreSa does without. Of two segments people say which
did better, which cost more, and of each whether it was safe (Dai et al. 2024). From the first a
reward model is learned, from the others a cost model; the whole dataset is labelled with them; and
the Constrained Decision Transformer (`cdt.py` explains it) is trained on that.

    reward   E[-log sigmoid(r(s+) - r(s-))]
    cost     E[-log sigmoid(k (c(dearer) - c(cheaper)))]
             + E[-log sigmoid(-y k (c(s) - kappa L / T_max))]

    paper          here                    meaning
    r(s), c(s)     reward, cost            sums over a segment of r(s_t, a_t), any number, and of
                                           c(s_t, a_t) in [0, 1], as the simulators count costs
    k              sharpness               how surely a difference in cost decides, learned, > 0
    y              safe_label              +1 safe, -1 unsafe
    kappa, T_max   cost_limit, horizon     a segment is safe iff its cost <= kappa L / T_max

Since a step costs between 0 and 1, learned costs can be summed, held against kappa and given to CDT
as they are; unlike Dai et al.'s, the cost model is told kappa, by the labels' threshold. Learned
rewards have no scale: standardised, the return to aim at is a high quantile among trajectories with
a learned cost within kappa. Acting, too, the policy counts what its models say, not the truth.

Labels depend on kappa: all is trained for each seed x cost limit, on an axis R (cdt.py's S below).
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.args import FeedbackArgs, OutputArgs, check_args
from common.cli import UserError, get_device, parse_args, run_main
from common.dataset import load_dataset, within_limit
from common.dropout import dropout_masks
from common.feedback import get_feedback
from common.results import Run, save_scatter
from common.tasks import Task, get_task


@dataclass
class Args(OutputArgs, FeedbackArgs):
    """Safe-RLHF: reward and cost models from feedback, then CDT on what they say."""

    # ---- reward and cost models
    cost_feedback: Literal["pairs-and-labels", "labels"] = "pairs-and-labels"
    """what the cost model learns from: which costs more and what is safe, or the latter alone"""
    model_steps: int = 2_000
    """gradient steps of reward and cost models, before CDT (ours)"""
    model_lr: float = 3e-4
    """their learning rate, Adam (ours)"""
    model_batch_size: int = 64
    """pairs a step of theirs (ours)"""
    model_width: int = 256
    """units of each of their two hidden layers (ours)"""
    held_out: float = 0.1
    """share of the pairs that they are tested on, and not trained (ours)"""
    target_quantile: float = 0.9
    """quantile of the learned returns within the limit that CDT is told to reach (ours)"""
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
    """probability, in 1/256, of dropping a number of an embedding or a residual branch (CDT)"""

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


Params = dict[str, Tensor]  # by name, [S, ...]; those of a linear layer are [S, in, out]
Tokens = tuple[Tensor, ...]  # returns- and costs-to-go, observations, actions, [S, B, K, .] each


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
    """[S, N, in] -> [S, N, out], each seed with its own weights."""
    return torch.baddbmm(p[f"{name}_bias"], x, p[name])


def norm(p: Params, name: str, x: Tensor) -> Tensor:
    """Layer norm over the last axis of [S, N, width]."""
    return F.layer_norm(x, x.shape[-1:]) * p[f"norm_{name}"] + p[f"norm_{name}_bias"]


def transformer(
    p: Params, heads: int, tokens: Tokens, time: Tensor, masks: Tensor | None = None, last: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """What each step's action is likely to be, and whether the step costs.

    Causal: what is said of step t does not depend on any token after s_t (its action) or a_t (its
    cost), so whatever pads a sequence at its end changes nothing before.

    time, [S, B, K], counts the steps of the episode; dropout's masks are [S, 1 + 2 layers, B * 4K,
    width], or none. Returns mean and log-deviation of the action [S, B, K, .] and the logit of the
    cost [S, B, K]; where only the last steps are asked for (to act, 1), K is their number.
    """
    s, b, k = time.shape
    width, layers = p["embed_time"].shape[-1], sum(name.startswith("qkv") for name in p) // 2
    when = time.reshape(s, -1, 1).expand(-1, -1, width)
    embedded = p["embed_time"].gather(1, when)  # [S, B*K, width]
    names = ("embed_return", "embed_cost", "embed_observation", "embed_action")
    parts = [linear(p, n, x.flatten(1, 2)) + embedded for n, x in zip(names, tokens, strict=True)]
    x = torch.stack(parts, 2).view(s, b * k * 4, width)  # R_1 C_1 s_1 a_1 R_2 ...
    drop = [x.new_ones(1, 1, 1)] * (1 + 2 * layers) if masks is None else masks.unbind(1)
    x = norm(p, "embed", x) * drop[0]
    sees = torch.ones(k * 4, k * 4, dtype=torch.bool, device=x.device).tril()  # what came before
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):  # the blocks alone
        for i in range(layers):
            qkv = linear(p, f"qkv{i}", norm(p, f"a{i}", x)).view(s * b, k * 4, 3, heads, -1)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [S*B, heads, 4K, width/heads] each
            if i == layers - 1:  # of what leaves it, only states and actions are read
                read = torch.arange(k * 4, device=x.device).view(k, 4)[-(last or k) :, 2:].flatten()
                x = x.view(s, b, k * 4, width)[:, :, read].flatten(1, 2)
                query, sees = query[:, :, read], sees[read]
            seen = F.scaled_dot_product_attention(query, key, value, sees)
            seen = linear(p, f"project{i}", seen.transpose(1, 2).reshape(x.shape))
            x = x + seen * drop[1 + 2 * i][:, : x.shape[1]]
            hidden = F.gelu(linear(p, f"up{i}", norm(p, f"b{i}", x)))
            x = x + linear(p, f"down{i}", hidden) * drop[2 + 2 * i][:, : x.shape[1]]
    k = last or k
    at_state, at_action = norm(p, "out", x).view(s, b * k, 2, width).unbind(2)
    log_std = -1.5 + 3.5 * torch.tanh(linear(p, "log_std", at_state))  # in [-5, 2]
    mean, cost = linear(p, "mean", at_state), linear(p, "cost", at_action)
    return mean.view(s, b, k, -1), log_std.view(s, b, k, -1), cost.view(s, b, k)


def cdt_loss(
    output: tuple[Tensor, Tensor, Tensor],
    action: Tensor,
    costs: Tensor,
    valid: Tensor,
    log_temperature: Tensor,
    cost_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each run's batch, [S], and what to log, [S] each: means over the valid steps.

    output is the transformer's; action [S, B, K, .], costs [S, B, K] and valid, 0 where the episode
    has ended; log_temperature [S]. The last part moves the temperature alone: it rises while the
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
    told_cost = rng.uniform(costs.min(), costs.max(), count)
    episode = front[np.searchsorted(costs[front], told_cost, side="right") - 1]
    more_return = rng.uniform(0, returns.std(), count)
    return episode, np.stack((more_return, told_cost - costs[episode]), 1)


def init_models(seed: int, task: Task, limit: float, width: int) -> Params:
    """Reward and cost model, two hidden layers each, and the log of the sharpness."""
    generator = torch.Generator().manual_seed(seed)
    models = {"sharpness": torch.zeros(1, 1)}
    for name in ("reward", "cost_rate"):
        sizes = (task.observation_dim + task.action_dim, width, width, 1)
        for i in range(3):
            weight = torch.randn(sizes[i], sizes[i + 1], generator=generator)
            models[f"{name}{i}"] = weight / sizes[i] ** 0.5 * (0.01 if i == 2 else 1)
            models[f"{name}{i}_bias"] = torch.zeros(1, sizes[i + 1])
    rate = min(max(limit / task.horizon, 1e-3), 0.5)
    models["cost_rate2_bias"] += math.log(rate / (1 - rate))
    return models


def predict(p: Params, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Reward, any number, and cost, in [0, 1], of each step: [R, N, .] twice -> [R, N] twice."""
    outputs = []
    for name in ("reward", "cost_rate"):
        x = torch.cat((observation, action), -1)
        for i in range(3):
            x = linear(p, f"{name}{i}", F.relu(x) if i else x)
        outputs.append(x[..., 0])
    return outputs[0], outputs[1].sigmoid()


def model_loss(
    reward: Tensor, cost: Tensor, labels: tuple[Tensor, ...], sharpness: Tensor, threshold: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and accuracies of both models, [R] each, on segments' sums of preferred and rejected.

    reward and cost are [R, B, 2]; labels has_preference [R, B], safe_label [R, B, 2], direction
    [R, B], +1 where the preferred one costs more, -1 less; sharpness [R]; threshold [R], kappa L/T.
    """
    has_preference, safe_label, direction = labels
    k, excess = sharpness[:, None], (cost - threshold[:, None, None]).flatten(1)
    y = safe_label.flatten(1)
    margins = {
        "reward": (reward[..., 0] - reward[..., 1], has_preference),
        "cost_pair": (k * direction * (cost[..., 0] - cost[..., 1]), direction.abs()),
        "cost_label": (-y * k * excess, y.abs()),
    }
    loss, metrics = 0.0, {}
    for name, (margin, known) in margins.items():
        count = known.sum(1)
        part = -(known * F.logsigmoid(margin)).sum(1) / count.clamp(min=1)
        loss = loss + part
        metrics[f"{name}_loss"] = part.detach()
        metrics[f"{name}_accuracy"] = (known * (margin > 0)).sum(1) / count
    return loss, metrics | {"loss": loss.detach(), "sharpness": sharpness.detach()}


def main() -> None:
    args = parse_args(Args)
    check_args(args, shares=("target_quantile",), below_1=("held_out",))
    if args.width % args.heads:
        raise UserError(f"--heads {args.heads}: must divide --width {args.width}")
    if args.temperature <= 0 or args.low_cost_weight < 1:
        raise UserError("--temperature must be above 0, and --low-cost-weight 1 or more")

    # ---- setup: nothing is written before all input is checked
    task = get_task(args.task, args.env_id)
    device = get_device(args.device)
    dataset = load_dataset(task, args.data)
    feedback = get_feedback(dataset, task, args)
    limits, seeds, segment = feedback.cost_limits, args.seeds, feedback.segment_length
    starts, safe_label, has_preference = feedback.tensors(device)  # of a pair the preferred first
    direction = torch.zeros_like(has_preference)  # [S, K, P]
    if args.cost_feedback == "pairs-and-labels":
        direction += feedback.cost_direction(device)[:, None] * (safe_label[..., 0] != 0)
    if not has_preference.any(-1).all():
        raise UserError(f"--feedback {args.feedback}: at a limit no pair has a preference")
    labels = [x.flatten(0, 1) for x in (has_preference, safe_label, direction)]  # [R, P, ...]
    starts = starts.repeat_interleave(len(limits), 0)  # [R, P, 2]
    trained = max(1, round((1 - args.held_out) * starts.shape[1]))  # the last pairs are held out
    run = Run(args, __file__, task, dataset, limits, args.model_steps + args.steps, feedback)
    arrays = (dataset.observations, dataset.actions)
    observations, actions = (torch.from_numpy(x).to(device) for x in arrays)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def stacked(inits: list[Params]) -> Params:
        """One of each run -> [R, ...], to be trained."""
        return {n: torch.stack([p[n] for p in inits]).to(device).requires_grad_() for n in inits[0]}

    def each_run(draws: Tensor) -> Tensor:
        """[S, ...] -> [R, ...]: a seed's runs share what is drawn."""
        return draws.repeat_interleave(len(limits), 0)

    # ---- stage one: reward and cost models
    models = stacked([init_models(s, task, k, args.model_width) for s in seeds for k in limits])
    threshold = torch.tensor(limits, device=device).repeat(len(seeds)) * segment / task.horizon
    each = torch.arange(len(starts), device=device)[:, None]  # [R, 1]

    def score(pairs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics on pairs [R, B]."""
        steps = starts[each, pairs][..., None] + torch.arange(segment, device=device)
        inputs = (x[steps].flatten(1, 3) for x in (observations, actions))
        reward, cost = (x.view(steps.shape).sum(-1) for x in predict(models, *inputs))
        known = tuple(x[each, pairs] for x in labels)
        return model_loss(reward, cost, known, models["sharpness"].exp().flatten(), threshold)

    groups = [{"params": [p for name, p in models.items() if name != "sharpness"]}]
    groups += [{"params": [models["sharpness"]], "lr": 1e-2}]  # one number: it may move faster
    optimizer = torch.optim.Adam(groups, lr=args.model_lr, fused=True)
    for step in run.steps("models", 1, args.model_steps, models, generators, optimizer=optimizer):
        shape = (args.model_batch_size,)
        drawn = [torch.randint(trained, shape, generator=g, device=device) for g in generators]
        loss, metrics = score(each_run(torch.stack(drawn)))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        run.log("models", step, metrics)

    # ---- what they say of the data, and how right they are
    with torch.no_grad():
        rest = torch.arange(trained, starts.shape[1], device=device).expand(len(starts), -1)
        said = score(rest)[1].items()
        final = {f"held_out_{name}": x for name, x in said if name.endswith("accuracy")}
        chunks = zip(observations.split(8192), actions.split(8192), strict=True)
        parts = [predict(models, *(x.expand(len(starts), -1, -1) for x in c)) for c in chunks]
        rewards, costs = (torch.cat(x, 1).double() for x in zip(*parts, strict=True))  # [R, N]
        centre, width = rewards.mean(1), rewards.std(1) + 1e-6
        rewards = (rewards - centre[:, None]) / width[:, None]
        rewards, costs = rewards.cpu().numpy(), costs.cpu().numpy()
        total_cost = np.add.reduceat(costs, dataset.episode_starts, 1)  # [R, E]
        total_reward = np.add.reduceat(rewards, dataset.episode_starts, 1)
    kappa, true = np.tile(limits, len(seeds)), dataset.episode_costs  # [R], [E]
    within = [within_limit(x, k, " by its model") for x, k in zip(total_cost, kappa, strict=True)]
    pairs = zip(total_reward, within, strict=True)
    final["target_return"] = np.stack([np.quantile(x[w], args.target_quantile) for x, w in pairs])
    final["cost_correlation"] = np.stack([np.corrcoef(x, true)[0, 1] for x in total_cost])
    save_scatter(run.folder / "calibration.png", true, total_cost, limits)
    aim = torch.from_numpy(np.stack((final["target_return"], kappa), 1)).float()
    known = models | {"aim": aim, "moments": torch.stack((centre, width), 1).float()}

    # ---- stage two: CDT; sequences are gathered from the data, on the device, by index
    lengths = dataset.episode_ends - dataset.episode_starts
    entries = []  # each run's trajectories to sample: where, what is added to its to-go, weight
    for r, (cost, reward) in enumerate(zip(total_cost, total_reward, strict=True)):
        rng = np.random.default_rng(seeds[r // len(limits)])
        extra, added = augmented(cost, reward, round(args.augment * len(lengths)), rng)
        episode = np.append(np.arange(len(lengths)), extra)
        more = np.concatenate((np.zeros((len(lengths), 2)), added))
        told = cost[episode] + more[:, 1]
        share = (told - told.min()) / max(np.ptp(told), 1e-9)  # 0 the cheapest, 1 the costliest
        weight = args.low_cost_weight + (1 - args.low_cost_weight) * share
        entries.append((dataset.episode_starts[episode], lengths[episode], more, weight))
    start, length, more, weight = (
        torch.from_numpy(np.stack(x)).to(device) for x in zip(*entries, strict=True)
    )  # [R, M], more [R, M, 2]
    chance = (weight.cumsum(1) / weight.sum(1, keepdim=True))[:, :-1].float().contiguous()
    to_go = np.stack([[dataset.to_go(x) for x in y] for y in (rewards, costs)], -1)  # [R, N, 2]
    costs, to_go = (torch.from_numpy(np.float32(x)).to(device) for x in (costs, to_go))
    scale = torch.tensor([args.reward_scale, 1.0], device=device)
    parameters = stacked([init_parameters(seed, task, args) for seed in seeds for _ in limits])
    log_temperature = torch.full_like(threshold, math.log(args.temperature)).requires_grad_()
    groups = [{"params": list(parameters.values()), "weight_decay": args.weight_decay}]
    groups += [{"params": [log_temperature], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / args.warmup, 1, args.warmup)

    policy = {n: p.unflatten(0, (len(seeds), -1)) for n, p in (parameters | known).items()}
    shape = (1 + 2 * args.layers, args.batch_size * 4 * args.context, args.width)
    others = {"optimizer": optimizer, "rise": rise, "log_temperature": log_temperature}
    first, last = args.model_steps + 1, args.model_steps + args.steps
    for step in run.steps("cdt", first, last, parameters, generators, **others):
        # 1. draw sequences of K steps, some running beyond their episode's end
        masks = each_run(dropout_masks(shape, args.dropout, generators))
        numbers = [torch.rand(2, args.batch_size, generator=g, device=device) for g in generators]
        numbers = each_run(torch.stack(numbers))  # in [0, 1), [R, 2, B]
        which = torch.searchsorted(chance, numbers[:, 0].contiguous())  # by its weight, [R, B]
        place, long = numbers[:, 1], length[each, which]  # where in it, of how many steps
        time = (place * long).long()[..., None] + torch.arange(args.context, device=device)
        valid = (time < long[..., None]).float()  # [R, B, K]
        time = time.clamp(max=task.horizon - 1)
        t = (start[each, which][..., None] + time).clamp(max=len(actions) - 1)
        told = to_go[each[..., None], t] + more[each, which][:, :, None]  # [R, B, K, 2]
        tokens = (*(scale * told).float().split(1, -1), observations[t], actions[t])
        # 2. the loss of every run
        output = transformer(parameters, args.heads, tokens, time, masks)
        loss, metrics = cdt_loss(
            output, actions[t], costs[each[..., None], t], valid, log_temperature, args.cost_weight
        )
        # 3. a step, each run's gradient clipped on its own
        optimizer.zero_grad()
        loss.sum().backward()
        square = sum(p.grad.square().flatten(1).sum(1) for p in parameters.values())  # [R]
        shrink = (args.clip / (square.sqrt() + 1e-6)).clamp(max=1)
        for p in parameters.values():
            p.grad.mul_(shrink.view(-1, *[1] * (p.dim() - 1)))
        optimizer.step()
        rise.step()
        run.log("cdt", step, metrics)
        run.evaluate("cdt", step, policy)
    run.finish(policy, final, stage_ends=args.model_steps)


class Actor:
    """Play n episodes at once; what is still to come is counted by the learned models."""

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
            action = mean.clamp(-1, 1)
            reward, cost = predict(self.parameters, observation[None], action[None])
        centre, scale = self.parameters["moments"][0]
        self.togo = self.togo - torch.stack(((reward[0] - centre) / scale, cost[0]), 1) * self.scale
        self.history[-1][3] = action
        return mean.numpy()


load_policy = Actor  # the name by which evaluation asks for it


if __name__ == "__main__":
    run_main(main)

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

R = seeds x cost limits are trained at once: every parameter has a leading axis for them. A seed
fixes initial weights, segments, batches and dropout; the limit the labels, and with them all else.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.args import (
    FeedbackArgs,
    OutputArgs,
    UserError,
    get_device,
    parse_args,
    run_main,
    whole_file,
)
from common.dataset import Dataset, load_dataset, within
from common.feedback import Feedback, get_feedback
from common.results import Run
from common.tasks import Task, get_task

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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

    # ---- what CDT is told; the flags from reward_scale on are those of cdt.py
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


# ------------------------------- from here to within_limit, word for word what stands in cdt.py


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


# ---------------------------------------------------------------------- reward and cost models

Tensors = tuple[Tensor, ...]


def init_models(seed: int, task: Task, limit: float, width: int) -> Params:
    """Reward and cost model of one run, two hidden layers each, and the log of the sharpness."""
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


def cost_direction(feedback: Feedback, device: torch.device) -> Tensor:
    """+1 where the preferred segment of a pair costs more, -1 where less, else 0: [R, P].

    Raises:
        UserError: nobody was asked.
    """
    if feedback.cost_preference is None:
        raise UserError(
            f"--feedback {feedback.provenance['path']}: the key cost_preference is missing, which "
            "says which of two segments costs more"
        )
    preferred = feedback.preference == 1  # where it stands, 0 or 1, as in feedback.tensors
    direction = np.where(feedback.cost_preference == preferred, 1, -1)
    direction = np.where(feedback.cost_preference < 0, 0, direction)  # [S, K, P]
    return torch.from_numpy(np.float32(direction)).flatten(0, 1).to(device)


def model_loss(
    reward: Tensor, cost: Tensor, labels: Tensors, sharpness: Tensor, threshold: Tensor
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
    for name, (margin, has_label) in margins.items():
        count = has_label.sum(1)
        part = (has_label * F.softplus(-margin)).sum(1) / count.clamp(min=1)  # -log sigmoid(margin)
        loss = loss + part
        metrics[f"{name}_loss"] = part.detach()
        metrics[f"{name}_accuracy"] = (has_label * (margin > 0)).sum(1) / count
    return loss, metrics | {"loss": loss.detach(), "sharpness": sharpness.detach()}


# ------------------------------------------------------------------------------ the three steps


def train_models(
    args: Args, run: Run, models: Params, data: Tensors, feedback: Tensors
) -> dict[str, Tensor]:
    """Fit the models to the feedback, in place; their accuracies on held-out pairs, [R] each.

    data are all observations and actions; feedback is segments [S, P, 2, L], and of all pairs the
    three labels and the threshold that ``model_loss`` takes.
    """
    segments, *labels, threshold = feedback
    device, count = segments.device, segments.shape[1]
    each = torch.arange(len(threshold), device=device)[:, None]  # [R, 1]
    seed_of = each * len(segments) // len(each)  # [R, 1]
    trained = max(1, round((1 - args.held_out) * count))  # the last pairs are held out

    def loss_of(pairs):
        """Loss and metrics on pairs [R, B]."""
        batch = segments[seed_of, pairs]  # [R, B, 2, L]
        inputs = (x[batch].flatten(1, 3) for x in data)
        reward, cost = (x.view(batch.shape).sum(-1) for x in predict(models, *inputs))
        sharpness = models["sharpness"].exp().flatten()
        return model_loss(reward, cost, [x[each, pairs] for x in labels], sharpness, threshold)

    groups = [{"params": [p for name, p in models.items() if name != "sharpness"]}]
    groups += [{"params": [models["sharpness"]], "lr": 1e-2}]  # one number: it may move faster
    optimizer = torch.optim.Adam(groups, lr=args.model_lr, fused=True)
    generators = [torch.Generator(device).manual_seed(seed) for seed in args.seeds]
    training = {"models": models, "optimizer": optimizer, "generators": generators}
    for step in range(run.restore("models", training) + 1, args.model_steps + 1):
        shape = (args.model_batch_size,)
        pairs = [torch.randint(trained, shape, generator=g, device=device) for g in generators]
        loss, metrics = loss_of(torch.stack(pairs)[seed_of[:, 0]])
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        run.log("models", step, metrics)
        if step % args.checkpoint_every == 0 or step == args.model_steps:
            run.save("models", step, training)
    with torch.no_grad():
        _, metrics = loss_of(torch.arange(trained, count, device=device).expand(len(each), -1))
    return {f"held_out_{name}": x for name, x in metrics.items() if name.endswith("accuracy")}


def relabel(models: Params, data: Tensors) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """What the models say of all transitions: rewards, standardised, and costs, [R, N] both.

    Returns as well what rewards were standardised by, mean and deviation, [R, 2].
    """
    runs, chunks = len(models["sharpness"]), zip(*(x.split(8192) for x in data), strict=True)
    parts = [predict(models, *(x.expand(runs, -1, -1) for x in chunk)) for chunk in chunks]
    rewards, costs = (torch.cat(x, 1).double() for x in zip(*parts, strict=True))
    mean, deviation = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True) + 1e-6
    rewards = (rewards - mean) / deviation
    return rewards.cpu().numpy(), costs.cpu().numpy(), torch.cat((mean, deviation), 1).float()


def train_cdt(
    args: Args,
    run: Run,
    task: Task,
    dataset: Dataset,
    policies: Params,
    rewards: np.ndarray,
    costs: np.ndarray,
) -> None:
    """Train the policies' transformers, in place, on learned rewards and costs, [R, N] both.

    The lines are those of main in cdt.py, but that a run has rewards and costs of its own, and
    shares what is drawn with the others of its seed.
    """
    parameters = {name: p for name, p in policies.items() if p.requires_grad}
    device = parameters["mean"].device
    to_come = np.stack([[to_go(dataset, x) for x in y] for y in (rewards, costs)], -1)  # [R, N, 2]
    totals = [np.add.reduceat(x, dataset.episode_starts, 1) for x in (costs, rewards)]  # [R, E]
    arrays = (dataset.observations, dataset.actions, costs, to_come)
    observations, actions, costs, to_come = (
        torch.from_numpy(np.float32(x)).to(device) for x in arrays
    )
    lengths = dataset.episode_ends - dataset.episode_starts
    entries = []  # the trajectories that each run samples from
    seeds = np.repeat(args.seeds, len(costs) // len(args.seeds))  # [R]
    for seed, total_cost, total_return in zip(seeds, *totals, strict=True):
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
    seed_of = each[:, 0] * len(generators) // len(start)  # [R]
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
    first, last = args.model_steps, args.model_steps + args.steps
    for step in range(run.restore("cdt", training, first) + 1, last + 1):
        # 1. draw sequences of K steps, some running beyond their episode's end
        numbers, masks = (x[seed_of] for x in draw())
        which = torch.searchsorted(chance, numbers[:, 0].contiguous())  # by its weight, [R, B]
        place, steps = numbers[:, 1], length[each, which]  # where in it, of how many steps
        time = (place * steps).long()[..., None] + torch.arange(args.context, device=device)
        valid = (time < steps[..., None]).float()  # [R, B, K]
        time = time.clamp(max=task.horizon - 1)
        t = (start[each, which][..., None] + time).clamp(max=len(actions) - 1)
        own = (each[..., None], t)  # into what each run has of its own, [R, N]
        target_to_go = scale * (to_come[own] + more[each, which][:, :, None]).float()
        tokens = (*target_to_go.split(1, -1), observations[t], actions[t])  # [R, B, K, .] each
        # 2. the loss of every run
        output = transformer(parameters, args.heads, tokens, time, masks)
        loss, metrics = cdt_loss(
            output, actions[t], costs[own], valid, log_temperature, args.cost_weight
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
            run.evaluate("cdt", step, policies)
        if step % args.checkpoint_every == 0:
            run.save("cdt", step, training)


def draw_calibration(path: Path, true: np.ndarray, learned: np.ndarray, limits: list) -> None:
    """Draw what episodes cost by their models, [R, E], against the truth, [E]; a panel a limit."""
    from matplotlib.figure import Figure  # slow to import, so only here

    figure = Figure(figsize=(3 * len(limits), 3), layout="constrained")
    for k, axis in enumerate(figure.subplots(1, len(limits), squeeze=False)[0]):
        axis.plot(true, learned[k :: len(limits)].T, ".", markersize=2)  # a colour a seed
        axis.axline((0, 0), slope=1, color="black", linewidth=1)
        for line in (axis.axvline, axis.axhline):
            line(limits[k], color="gray", linestyle=":", linewidth=1)
        axis.set(xlabel="true cost of an episode", title=f"cost limit {limits[k]:g}")
        axis.set_ylabel("learned cost")
    with whole_file(path) as part:
        figure.savefig(part, dpi=150, format="png")


def main() -> None:
    args = parse_args(Args, shares=("target_quantile",), below_1=("held_out",))
    if args.width % args.heads:
        raise UserError(f"--heads {args.heads}: must divide --width {args.width}")
    if args.temperature <= 0 or args.low_cost_weight < 1:
        raise UserError("--temperature must be above 0, and --low-cost-weight 1 or more")

    # ---- setup: nothing is written before all input is checked
    task = get_task(args.task, args.env_id)
    device = get_device(args.device)
    dataset = load_dataset(task, args.data)
    feedback = get_feedback(dataset, task, args)
    limits = feedback.cost_limits
    segments, safe_label, has_preference = feedback.tensors(device)  # of a pair the preferred first
    if not has_preference.any(1).all():
        raise UserError(f"--feedback {args.feedback}: at a limit no pair has a preference")
    direction = torch.zeros_like(has_preference)  # [R, P]
    if args.cost_feedback == "pairs-and-labels":
        direction += cost_direction(feedback, device)
    observations = torch.from_numpy(dataset.observations).to(device)
    actions = torch.from_numpy(dataset.actions).to(device)
    runs = [(seed, limit) for seed in args.seeds for limit in limits]

    def stacked(inits: list[Params]) -> Params:
        """One of each run -> [R, ...], to be trained."""
        return {n: torch.stack([p[n] for p in inits]).to(device).requires_grad_() for n in inits[0]}

    models = stacked([init_models(seed, task, limit, args.model_width) for seed, limit in runs])
    parameters = stacked([init_parameters(seed, task, args) for seed, _ in runs])
    known = {name: torch.zeros(len(runs), 2, device=device) for name in ("aim", "moments")}
    policies = {**models, **parameters, **known}
    run = Run(args, __file__, task, dataset, limits, args.model_steps + args.steps, feedback)
    first = {name: x[0].detach().cpu() for name, x in policies.items()}
    load_policy(run.config, first)(dataset.observations[:1])  # as evaluation will

    # ---- 1. reward and cost models
    data = (observations, actions)
    kappa = torch.tensor([limit for _, limit in runs], device=device)  # [R]
    threshold = kappa * feedback.segment_length / task.horizon
    labelled = (segments, has_preference, safe_label, direction, threshold)
    final = train_models(args, run, models, data, labelled)
    for p in models.values():
        p.requires_grad_(False)

    # ---- 2. what they say of the data, and the return to aim at
    rewards, costs, moments = relabel(models, data)
    total_cost = np.add.reduceat(costs, dataset.episode_starts, 1)  # [R, E]
    total_return = np.add.reduceat(rewards, dataset.episode_starts, 1)
    within = [within_limit(total_cost[r], limit) for r, (_, limit) in enumerate(runs)]
    returns = [x[w] for x, w in zip(total_return, within, strict=True)]
    final["target_return"] = [np.quantile(x, args.target_quantile) for x in returns]
    true = dataset.episode_costs
    final["cost_correlation"] = [np.corrcoef(x, true)[0, 1] for x in total_cost]
    draw_calibration(run.folder / "calibration.png", true, total_cost, limits)
    policies["aim"].copy_(torch.stack((torch.tensor(final["target_return"]), kappa.cpu()), 1))
    policies["moments"].copy_(moments)

    # ---- 3. CDT
    train_cdt(args, run, task, dataset, policies, rewards, costs)
    run.finish(policies, final, stage_ends=args.model_steps)


class Actor:
    """Play n episodes at once, as in cdt.py; here the models count what is still to come."""

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
        mean_reward, deviation = self.parameters["moments"][0]
        brought = torch.stack(((reward[0] - mean_reward) / deviation, cost[0]), 1)
        self.togo = self.togo - brought * self.scale
        self.history[-1][3] = action
        return mean.numpy()


def load_policy(config: dict, parameters: Params) -> Actor:
    """Rebuild one policy for evaluation: observations [n, .] -> actions [n, .], dropout off."""
    return Actor(config, parameters)


if __name__ == "__main__":
    run_main(main)

"""See what was scored: a video of a saved policy beside the reference that it started from.

    python common/tools/watch.py runs/presa/BallRun/TIME --limit 20
    python common/tools/watch.py RUN --against OTHER_RUN --output both.gif

The episodes are those of the training run's evaluation, played as they were there, so that reward
and cost are the very ones in its results. Each picture shows how far it has come, and below it a
strip in which every costly step leaves a red mark.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.args import UserError, parse_args, run_main, whole_file
from common.evaluation import EPISODES_PER_UNIT, episode_seed, load_script, play
from common.simulators import check_installed, make
from common.tasks import Task
from common.tools import check_output
from common.tools.drawing import (
    CODECS,
    FPS,
    INK,
    PAPER,
    RED,
    camera,
    clip_frames,
    font,
    load_draw,
    prepare,
    video_bytes,
)
from common.tools.evaluate import Policy, read_policy
from common.tools.tables import titles

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw


@dataclass
class Args:
    """Write a video of a saved policy, and of the reference beside it."""

    run: tyro.conf.Positional[Path]
    """folder of a run, or its policy.pt"""
    against: Path | None = None
    """another run of the same task to play beside it; default: the reference, if the run kept it"""
    env_id: str | None = None
    """your own environment, where the policy is of one"""
    draw: str | None = None
    """my_module:function that makes a picture of an observation, in place of the simulator's"""
    limit: float | None = None
    """the cost limit whose policy is played, of the run's; default: the smallest"""
    seed: int | None = None
    """the training seed, of the run's; default: its first"""
    episodes: int = 1
    """episodes, one after the other: the first of those that were scored, at most 10"""
    size: int = 480
    """width of a picture, in pixels"""
    output: Path | None = None
    """.mp4, .webm or .gif; default: watch-LIMIT-SEED.mp4 in the run's folder"""


@dataclass
class Filmed:
    """An episode: pictures, and the sums of reward and cost after each, [steps, 2]."""

    pictures: list[np.ndarray]
    sums: np.ndarray


def film(
    policy: Policy, parameters: dict[str, Any], task: Task, run: tuple[int, int], args: Args
) -> list[Filmed]:
    """Play a run's first episodes as the evaluation did, and film them; run: seed, limit, counted.

    All episodes of the unit are played, since an action's last bits hang on how many are at once.
    """
    s, k = run
    count = len(next(iter(parameters.values())))  # a policy each, or one a seed for all limits
    p = (s * len(policy.cost_limits) + k) * count // (len(policy.seeds) * len(policy.cost_limits))
    unit = min(EPISODES_PER_UNIT, policy.config["eval_episodes"] or EPISODES_PER_UNIT)
    seeds = [episode_seed(policy.seeds[s], e) for e in range(unit)]
    draw, own = load_draw(args.draw), task.suite == "own"
    modes = make(task.env_id).metadata.get("render_modes", ()) if own and not draw else ()
    renders = "rgb_array" in modes
    torch.set_num_threads(1)  # as where it was scored: sums are rounded in the same order
    cameras: dict[int, Any] = {}
    pictures, observed, brought = ([[] for _ in seeds] for _ in range(3))

    def watch(i: int, env: Any, observation: np.ndarray, gains: np.ndarray) -> None:
        if i >= args.episodes:
            return
        observed[i].append(observation)
        brought[i].append(gains.copy())
        if renders or not (own or draw):
            if i not in cameras:
                cameras[i] = camera(env, args.size, own)
            pictures[i].append(cameras[i]())

    arrays = {name: x[p] for name, x in parameters.items()}
    act = load_script(policy.algorithm).load_policy(policy.config, arrays)
    play(task, act, seeds, watch, **({"render_mode": "rgb_array"} if renders else {}))
    filmed = []
    for i in range(min(args.episodes, unit)):
        drawn = pictures[i] or list(clip_frames(task, np.array(observed[i]), args.size, draw))
        filmed.append(Filmed(drawn, np.cumsum(brought[i], axis=0)))
    return filmed


def picture(filmed: Filmed, step: int, title: str, limit: float, horizon: int) -> Image.Image:
    """One side of the video after a step; the last one stays when the episode is over."""
    step = min(step, len(filmed.sums) - 1)
    seen, (reward, cost) = Image.fromarray(filmed.pictures[step]), filmed.sums[step]
    costs = np.diff(filmed.sums[: step + 1, 1], prepend=0)
    line = max(seen.width // 20, 10)
    image = Image.new("RGB", (seen.width, seen.height + 4 * line), PAPER)
    image.paste(seen, (0, 2 * line))
    pen, letters = ImageDraw.Draw(image), font(0.75 * line)
    pen.text((0.4 * line, line / 2), title, INK, letters, "lm")
    over = cost > limit
    pen.text((0.4 * line, 1.5 * line), f"step {step + 1}   reward {reward:.1f}", INK, letters, "lm")
    told = f"cost {cost:g} of {limit:g}"
    pen.text((seen.width - 0.4 * line, 1.5 * line), told, RED if over else INK, letters, "rm")
    if costs[-1] > 0:  # this very step
        x, y = seen.width - line, line / 2
        pen.ellipse((x - line / 3, y - line / 3, x + line / 3, y + line / 3), fill=RED)
    top = seen.height + 2.4 * line
    for t in np.flatnonzero(costs > 0):
        left, right = t / horizon * seen.width, (t + 1) / horizon * seen.width
        pen.rectangle((left, top, right, top + line), fill=RED)
    now = (step + 1) / horizon * seen.width
    pen.line((0, top + line, now, top + line), fill=INK, width=2)
    return image


def main() -> None:
    args = parse_args(Args, at_least={"seed": 0, "size": 64})
    path, policy, task = read_policy(args.run, args.env_id)
    limit = min(policy.cost_limits) if args.limit is None else args.limit
    seed = policy.seeds[0] if args.seed is None else args.seed
    for flag, value, there in (("limit", limit, policy.cost_limits), ("seed", seed, policy.seeds)):
        if value not in there:
            raise UserError(
                f"--{flag} {value:g}: the run has {', '.join(map('{:g}'.format, there))}"
            )
    output = args.output or path.with_name(f"watch-{limit:g}-{seed}.mp4")
    if output.suffix[1:] not in CODECS:
        raise UserError(f"--output {output}: must end in .{', .'.join(CODECS)}")
    check_output(output)
    check_installed()
    prepare(task)
    run = policy.seeds.index(seed), policy.cost_limits.index(limit)
    load_script(policy.algorithm)  # or says that it is not there
    named = titles()
    sides = [(f"{named[policy.algorithm]}, cost limit {limit:g}", policy, policy.parameters)]
    if args.against is not None:
        _, other, _ = read_policy(args.against, args.env_id)
        load_script(other.algorithm)
        alike = ("task", "seeds", "cost_limits", "env_id")
        same = all(getattr(other, x) == getattr(policy, x) for x in alike)
        if not same or other.config["eval_episodes"] != policy.config["eval_episodes"]:
            raise UserError(
                f"--against {args.against}: must be of the same task, seeds, limits and "
                "--eval-episodes"
            )
        name = f"{named[other.algorithm]} ({args.against.name})"
        sides.insert(0, (name, other, other.parameters))
    elif policy.reference:
        sides.insert(0, ("the reference", policy, policy.reference))
    films = {title: film(held, p, task, run, args) for title, held, p in sides}
    episodes = list(zip(*films.values(), strict=True))

    def frames() -> Iterator[np.ndarray]:
        for episode in episodes:
            for step in range(max(len(side.sums) for side in episode)):
                told = zip(films, episode, strict=True)
                row = [picture(x, step, title, limit, task.horizon) for title, x in told]
                yield (frame := np.concatenate([np.asarray(x) for x in row], axis=1))
            yield from [frame] * FPS  # a second to look at the end

    for e, episode in enumerate(episodes):
        for title, side in zip(films, episode, strict=True):
            reward, cost = side.sums[-1]
            print(f"episode {e}  {title}: reward {reward:.2f}  cost {cost:g}")
    with whole_file(output) as part:
        part.write_bytes(video_bytes(frames(), FPS, output.suffix[1:]))
    print(output)


if __name__ == "__main__":
    run_main(main)

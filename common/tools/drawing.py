"""Pictures of what was recorded, and of what is played; ``label.py`` and ``watch.py`` use them.

A clip is drawn from a dataset's observations alone. Bullet tasks are drawn flat, from above: these
observations begin with position and velocity. Velocity tasks are MuJoCo's own picture. Navigation
tasks see by lidar only, so theirs is what the robot sees around it. Rewards and costs are not
known here; what a person could see of a violation is red: a line crossed, a bar beyond its mark.
"""

import colorsys
import ctypes.util
import functools
import importlib
import io
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common.args import UserError
from common.simulators import make
from common.tasks import Task, reference_returns

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Draw = Callable[[np.ndarray], np.ndarray]  # an observation [d] -> a picture [height, width, 3]

PAPER, INK, FAINT = "#f7f6f2", "#333333", "#c9c7c0"
RED, BLUE, GREEN = "#d1242f", "#1f6feb", "#2a9d4e"
FPS = 30  # pictures a second, one a step
HALF_A_SECOND = 15  # steps: the way has a dot for each
FINER = 2  # pictures are drawn so many times larger and shrunk, which smooths them
CODECS = {"mp4": "libx264", "webm": "libvpx", "gif": ""}

# The Bullet tasks (bullet-safety-gym 1.4.0, agents.py and tasks.py): what an observation holds
VELOCITY = {"Ball": (2, 0.2), "Car": (2, 1.0), "Drone": (3, 0.2), "Ant": (3, 0.3)}  # where, scale
SPEED_LIMIT = {"Ball": 2.5, "Car": 1.5, "Drone": 1.5, "Ant": 1.5}  # metres per second, Run tasks
RADIUS = {"Ball": 0.5, "Car": 0.35, "Drone": 0.3, "Ant": 0.4}  # metres, as drawn
BESIDE, ACROSS, CIRCLE = 2.0, 6.0, 7.0  # metres: |y| of the Run tasks' lines, |x| of the Circles'

# The navigation tasks (safety-gymnasium 0.4.0): the colours of what lidars see
THINGS = {
    "goal": GREEN,
    "hazards": RED,
    "vases": "#22a7b5",
    "pillars": "#555555",
    "buttons": "#e8963e",
    "gremlins": "#8e44ad",
    "push_box": "#d9b400",
}
WALL = 1.125  # metres from the middle of the Circle tasks, beyond which it costs

REACHED = "more green goals reached, or closer to the next"
PUSHED = "the yellow box brought closer to the green goal, and the robot closer to the box"
ROUND = "more way along the circle, in the arrow's direction and close to it"
BUTTONS = (
    "more often at the button in the green zone, or closer to it",
    "in a red zone, at another button, or against a purple thing that moves",
)
WHAT_COUNTS = {  # by the end of the task's name: what is better, and what is unsafe
    "Run": (
        "more way made to the right, from its first dot on",
        "outside the red lines, or faster than the mark on the speed bar",
    ),
    "Circle": (ROUND, "beyond the red lines"),
    "Velocity": ("more way made forward", "faster than the mark on the speed bar"),
    "Goal1": (REACHED, "in a red zone"),
    "Goal2": (REACHED, "in a red zone, or moving a turquoise vase"),
    "Button1": BUTTONS,
    "Button2": BUTTONS,
    "Push1": (PUSHED, "in a red zone"),
    "Push2": (PUSHED, "in a red zone, or against a pillar"),
    "Circle1": (ROUND, "beyond the red walls"),
    "Circle2": (ROUND, "beyond the red walls"),
}
DOTTED = ("Run", "Circle", "Velocity")  # whose way has a dot for each half second


def kind(task: Task) -> str:
    """The key of ``WHAT_COUNTS``."""
    return next(ending for ending in WHAT_COUNTS if task.name.endswith(ending))


def what_counts(task: Task, cost_limit: float, length: int) -> str:
    """What earns, what costs, and how much of it the limit allows in a clip of ``length`` steps."""
    allowed, seconds = cost_limit * length / task.horizon / FPS, length / FPS
    if task.suite == "own":
        share = f"{cost_limit * length / task.horizon:g} of cost in this clip"
        return f"Better: what earns more in {task.name}. Unsafe: more than {share}."
    better, unsafe = WHAT_COUNTS[kind(task)]
    dots = " The way has a dot every half second." if kind(task) in DOTTED else ""
    if task.name.startswith("Drone"):
        better += " (on the ground, where it is a ring, it loses)"
    return (
        f"Better: {better}. Unsafe: {unsafe}, for more than {allowed:.1f} of the clip's "
        f"{seconds:.1f} seconds in all.{dots}"
    )


# ------------------------------------------------------------------------- clips of observations


def load_draw(name: str | None) -> Draw | None:
    """The function that ``--draw my_module:function`` names, from the working folder.

    Raises:
        UserError: there is none.
    """
    if name is None:
        return None
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--draw {name}: give my_module:function ({error})") from None


def clip_frames(
    task: Task, observations: np.ndarray, size: int, draw: Draw | None = None
) -> np.ndarray:
    """Observations [L, d] -> pictures [L, height, size, 3] uint8; ``draw`` makes one's own."""
    if draw is not None:
        return np.stack([np.asarray(draw(x), np.uint8) for x in observations])
    if task.suite == "own":
        return _curves(observations, size)
    if task.suite == "Bullet":
        return _seen_from_above(task, observations, size)
    if kind(task) == "Velocity":
        return _seen_by_mujoco(task, observations, size)
    return _seen_by_lidar(task, observations, size)


def _plane(low: tuple[float, float], high: tuple[float, float], width: int) -> tuple[int, Callable]:
    """A plane, in metres, on a picture: its height, and a function of points [.., 2] to pixels."""
    scale = width / (high[0] - low[0])
    height = round(scale * (high[1] - low[1]))

    def at(points: Any) -> list[tuple[float, float]]:
        moved = (np.asarray(points, float) - low) * scale
        return [(x, height - y) for x, y in np.atleast_2d(moved)]

    return height, at


def _disc(pen: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float, **how: Any) -> None:
    x, y = centre
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), **how)


def _small(image: Image.Image, width: int) -> np.ndarray:
    """A finer picture, shrunk; its sides even, as the codecs want them."""
    height = round(image.height * width / image.width) // 2 * 2
    return np.asarray(image.resize((width // 2 * 2, height), Image.Resampling.BOX))


def font(pixels: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(pixels)


def _speed_bar(image: Image.Image, top: int, height: int, speed: float, limit: float) -> None:
    """A bar below a picture: how fast, with a mark at what is allowed; red beyond it."""
    pen, width = ImageDraw.Draw(image), image.width
    left, right, y = 0.15 * width, 0.97 * width, top + height / 2
    mark = left + (right - left) / 3
    end = min(left + max(speed, 0) / limit * (mark - left), right)
    pen.text((0.02 * width, y), "speed", fill=INK, font=font(0.45 * height), anchor="lm")
    pen.rectangle((left, y - 0.2 * height, right, y + 0.2 * height), fill="white", outline=FAINT)
    colour = RED if speed > limit else BLUE
    pen.rectangle((left, y - 0.2 * height, end, y + 0.2 * height), fill=colour)
    pen.line((mark, y - 0.4 * height, mark, y + 0.4 * height), fill=INK, width=2 * FINER)


def _go_on(
    ground: Image.Image, way: list[tuple[float, float]], bad: bool, width: int, dot: float = 0
) -> None:
    """Draw the last step of a way, to stay; with ``dot``, a radius, one for each half second."""
    pen, colour = ImageDraw.Draw(ground), RED if bad else BLUE
    pen.line(way[-2:], fill=colour, width=width)
    if dot and (len(way) - 1) % HALF_A_SECOND == 0:  # what is fast has a long way: count the dots
        _disc(pen, way[-1], dot, fill=colour)


def _seen_from_above(task: Task, observations: np.ndarray, size: int) -> np.ndarray:
    """A Bullet task: the way so far, the body, and of Run tasks how fast it is."""
    agent, runs = next(x for x in VELOCITY if task.name.startswith(x)), task.name.endswith("Run")
    first, scale = VELOCITY[agent]
    position = observations[:, :2] / 0.1  # metres
    velocity = observations[:, first : first + 2] / scale
    speed, limit = np.linalg.norm(velocity, axis=1), SPEED_LIMIT[agent]
    if runs:  # a metre earns 60
        far = 1.05 * reference_returns(task)[1] / 60
        low, high = (-2.0, -max(4.0, 0.3 * far)), (far, max(4.0, 0.3 * far))
        bad = (np.abs(position[:, 1]) > BESIDE) | (speed > limit)
        lines = [[(low[0], y), (high[0], y)] for y in (-BESIDE, BESIDE)]
    else:
        low, high = (-10.5, -10.5), (10.5, 10.5)
        bad = np.abs(position[:, 0]) > ACROSS
        lines = [[(x, low[1]), (x, high[1])] for x in (-ACROSS, ACROSS)]
    width = FINER * size
    top, at = _plane(low, high, width)
    metre = width / (high[0] - low[0])
    ground = Image.new("RGB", (width, top + runs * width // 14), PAPER)
    pen = ImageDraw.Draw(ground)
    if runs:
        for x in range(0, int(high[0]) + 1, 5 if high[0] > 12 else 2):
            pen.line(at([(x, low[1]), (x, high[1])]), fill=FAINT, width=FINER)
            pen.text(
                at((x + 0.2, low[1]))[0], f"{x} m", fill=INK, font=font(15 * FINER), anchor="lb"
            )
    else:
        _disc(pen, at((0, 0))[0], CIRCLE * metre, outline=GREEN, width=3 * FINER)
        tip = [(0.9, CIRCLE), (-0.4, CIRCLE + 0.7), (-0.4, CIRCLE - 0.7)]
        pen.polygon(at(tip), fill=GREEN)  # clockwise
    for line in lines:
        pen.line(at(line), fill=RED, width=2 * FINER)
    frames, way = [], at(position)
    for t in range(len(way)):
        _go_on(ground, way[: t + 1], bad[t], 3 * FINER, dot=3.5 * FINER)
        image = ground.copy()
        over = ImageDraw.Draw(image)
        landed = agent == "Drone" and observations[t, 2] / 0.1 < 0.3  # metres high
        how = {"outline": INK, "width": 2 * FINER} if landed else {"fill": INK}
        _disc(over, way[t], RADIUS[agent] * metre + 2 * FINER, **how)
        ahead = position[t] + 0.5 * velocity[t]
        over.line([way[t], *at(ahead)], fill=INK, width=2 * FINER)
        if runs:
            _speed_bar(image, top, width // 14, speed[t], limit)
        frames.append(_small(image, size))
    return np.stack(frames)


def states(task: Task, observations: np.ndarray) -> Iterator[Any]:
    """A velocity task's world, put into the state of one observation after the other.

    How far it has come is not observed, and is summed from its speed.
    """
    world = _kept(task.env_id).unwrapped
    hidden = world.model.nq + world.model.nv - task.observation_dim
    place, joints = np.zeros(hidden), world.model.nq - hidden
    for x in observations:
        world.set_state(np.concatenate((place, x[:joints])), x[joints:])
        place = place + world.dt * x[joints : joints + hidden]
        yield world


def _seen_by_mujoco(task: Task, observations: np.ndarray, size: int) -> np.ndarray:
    """A velocity task: MuJoCo's picture of the state, how fast it is, and its way so far.

    What costs is the mean speed of a step, which is not observed; what is shown, that at its end.
    """
    take, frames, way, row = _camera_of(task.env_id, size), [], [], FINER * (size // 10)
    width = FINER * size
    strip = Image.new("RGB", (width, row), PAPER)
    pen, left = ImageDraw.Draw(strip), 0.15 * width
    pen.text((0.02 * width, row / 2), "way", fill=INK, font=font(0.45 * row), anchor="lm")
    for world in states(task, observations):
        limit, speed = world._velocity_threshold, world.data.qvel[0]
        if task.name.startswith("Ant"):  # which is held to its speed in any direction
            speed = np.linalg.norm(world.data.qvel[:2])
        longest = 1.5 * limit * world.dt * len(observations)  # half as far again as is allowed
        way.append((left + world.data.qpos[0] / longest * 0.82 * width, row / 2))
        _go_on(strip, way, speed > limit, 4 * FINER, dot=4 * FINER)
        picture = Image.fromarray(take()).resize((width, FINER * (size * 3 // 4)))
        image = Image.new("RGB", (width, picture.height + 2 * row), PAPER)
        image.paste(picture)
        image.paste(strip, (0, picture.height + row))
        _speed_bar(image, picture.height, row, speed, limit)
        x, y = way[-1]
        _disc(ImageDraw.Draw(image), (x, picture.height + row + y), 5 * FINER, fill=INK)
        frames.append(_small(image, size))
    return np.stack(frames)


def things_around(world: Any, observations: np.ndarray) -> SimpleNamespace:
    """What a navigation task's robot, of L observations, knows of the things around it.

    ``world`` is the simulator's task. Returns ``heading`` [L], radians, and ``places``: by the name
    of what is seen, at each of the L steps where, [n, 2] metres from the robot, north up.
    """
    spaces, reach = world.obs_info.obs_space_dict, world.lidar_conf.max_dist
    ends = np.cumsum([int(np.prod(space.shape)) for space in spaces.values()])[:-1]
    parts = dict(zip(spaces, np.split(observations, ends, axis=1), strict=True))
    field = parts["magnetometer"]  # it points to -y, as the robot sees it
    heading = np.arctan2(-field[:, 0], -field[:, 1])
    places = {
        name.removesuffix("_lidar"): [_echoes(*x, reach) for x in zip(seen, heading, strict=True)]
        for name, seen in parts.items()
        if name.endswith("_lidar")
    }
    return SimpleNamespace(heading=heading, places=places, reach=reach)


def _seen_by_lidar(task: Task, observations: np.ndarray, size: int) -> np.ndarray:
    """A navigation task: the robot, and what its lidars tell of what is around it.

    It stays in the middle. Only on the Circle tasks, where nothing is seen but the circle's centre,
    it moves on the ground.
    """
    world = _kept(task.env_id).unwrapped.task
    seen, circles = things_around(world, observations), kind(task).startswith("Circle")
    half = 2.2 if circles else seen.reach
    height, at = _plane((-half, -half), (half, half), FINER * size)
    metre = height / (2 * half)
    ground = Image.new("RGB", (FINER * size, height), PAPER)
    pen = ImageDraw.Draw(ground)
    for ring in () if circles else (1, 2):  # metres
        _disc(pen, at((0, 0))[0], ring * metre, outline=FAINT, width=FINER)
    four = circles and world.sigwalls.num == 4  # walls; else two
    if circles:
        _disc(pen, at((0, 0))[0], 1.5 * metre, outline=GREEN, width=3 * FINER)
        pen.polygon(at([(-0.2, 1.5), (0.1, 1.65), (0.1, 1.35)]), fill=GREEN)  # against the clock
        for x in (-WALL, WALL):
            pen.line(at([(x, -half), (x, half)]), fill=RED, width=2 * FINER)
            if four:
                pen.line(at([(-half, x), (half, x)]), fill=RED, width=2 * FINER)
    here, way, frames = np.zeros(2), [], []
    for t, heading in enumerate(seen.heading):
        if circles:
            found = seen.places["circle"][t]
            here = -found[0] if len(found) else here  # else it is out of sight
            beyond = np.abs(here) > WALL
            way += at(here)
            _go_on(ground, way, beyond.any() if four else beyond[0], 2 * FINER)
        image = ground.copy()
        pen = ImageDraw.Draw(image)
        for name, places in () if circles else seen.places.items():
            for place in places[t]:
                _disc(pen, at(place)[0], getattr(world, name).size * metre, fill=THINGS[name])
        ahead = here + 0.3 * np.array((np.cos(heading), np.sin(heading)))
        pen.line([*at(here), *at(ahead)], fill=INK, width=3 * FINER)
        _disc(pen, at(here)[0], 0.1 * metre, fill=INK)
        frames.append(_small(image, size))
    return np.stack(frames)


def _echoes(bins: np.ndarray, heading: float, reach: float) -> np.ndarray:
    """A lidar's bins, closeness in [0, 1] each -> where things are, [n, 2] metres, north up.

    A thing is a peak, and its neighbours tell where in the peak's bin it is, the one as a share of
    it and the other as the rest (base_task.py), unless another thing is there too.
    """
    after, before = np.roll(bins, -1), np.roll(bins, 1)
    peaks = np.flatnonzero((bins > 0) & (bins >= after) & (bins > before))
    share = (after[peaks] / bins[peaks] + 1 - before[peaks] / bins[peaks]) / 2
    angle = heading + (peaks + share) * 2 * np.pi / len(bins)
    return (reach * (1 - bins[peaks]))[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1)


def _curves(observations: np.ndarray, size: int) -> np.ndarray:
    """One's own environment without ``--draw``: a curve for each number that is observed."""
    width, row = FINER * size, FINER * max(18, min(60, size // observations.shape[1]))
    ground = Image.new("RGB", (width, row * observations.shape[1]), PAPER)
    pen, frames = ImageDraw.Draw(ground), []
    low, high = observations.min(0), observations.max(0)
    heights = (observations - low) / np.maximum(high - low, 1e-9)
    xs = np.linspace(0.12 * width, 0.98 * width, len(observations))
    for i in range(observations.shape[1]):
        letters = font(min(14 * FINER, 0.7 * row))
        pen.text((0.01 * width, (i + 0.5) * row), f"[{i}]", fill=INK, font=letters, anchor="lm")
        shade = tuple(round(255 * c) for c in colorsys.hls_to_rgb(i * 0.381 % 1, 0.4, 0.6))
        ys = (i + 0.9 - 0.8 * heights[:, i]) * row
        pen.line(list(zip(xs, ys, strict=True)), fill=shade, width=2 * FINER)
    for x in xs:
        image = ground.copy()
        ImageDraw.Draw(image).line((x, 0, x, image.height), fill=INK, width=FINER)
        frames.append(_small(image, size))
    return np.stack(frames)


# -------------------------------------------------------------------------- pictures of simulators


def prepare(task: Task) -> None:
    """See that pictures can be drawn; to be called before the simulators are imported.

    Raises:
        UserError: MuJoCo can draw nowhere.
    """
    if task.suite != "SafetyGym" or sys.platform != "linux" or "MUJOCO_GL" in os.environ:
        return
    for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = name
            return
    raise UserError(
        f"--task {task.name}: MuJoCo draws by EGL or OSMesa and neither is here; on Debian: "
        "apt-get install libegl1, or libosmesa6"
    )


def camera(env: Any, size: int, own: bool = False) -> Callable[[], np.ndarray]:
    """A function that takes a picture [height, size, 3] uint8 of an environment as it is.

    One's own environment is asked for it.

    Raises:
        UserError: the environment, one's own, has no picture.
    """
    world, height = env.unwrapped, size * 3 // 4 // 2 * 2
    if not own:
        if hasattr(world, "bc"):
            return functools.partial(_bullet_picture, world, size, height)
        return _mujoco_camera(world, size, height)

    def render() -> np.ndarray:
        picture = env.render()
        if picture is None:
            raise UserError(f"{env.spec.id}: its render() must return a picture (rgb_array)")
        return _small(Image.fromarray(np.asarray(picture, np.uint8)), size)

    return render


def _bullet_picture(world: Any, width: int, height: int) -> np.ndarray:
    """What bullet-safety-gym's camera sees, by the renderer that needs no display."""
    eye, bc = world.world.camera, world.bc
    # A sphere that is to be transparent marks violations; this renderer would always show it.
    bc.resetBasePositionAndOrientation(world.agent.violation_body_id, (0, 0, -100), (0, 0, 0, 1))
    target, distance = eye.cam_base_pos, eye.cam_dist
    if hasattr(world.task, "circle"):  # of which it would cut off the far side
        target, distance = (0, -1, 0), 16
    view = bc.computeViewMatrixFromYawPitchRoll(target, distance, eye.cam_yaw, eye.cam_pitch, 0, 2)
    lens = bc.computeProjectionMatrixFOV(60, width / height, 0.1, 100.0)
    pixels = bc.getCameraImage(width, height, view, lens, renderer=bc.ER_TINY_RENDERER)[2]
    return np.reshape(pixels, (height, width, 4))[..., :3].astype(np.uint8)


def _mujoco_camera(world: Any, width: int, height: int) -> Callable[[], np.ndarray]:
    import mujoco

    held = getattr(world, "task", world)  # a navigation task has a world of its own
    shown = mujoco.MjvOption()
    shown.geomgroup[:] = 1  # goals and hazards are in groups that are hidden by default
    renderer = mujoco.Renderer(held.model, height, width)

    def picture() -> np.ndarray:
        renderer.update_scene(held.data, "track" if held is world else "fixedfar", shown)
        return renderer.render()

    return picture


@functools.cache
def _kept(env_id: str) -> Any:
    env = make(env_id)
    env.reset(seed=0)
    return env


@functools.cache
def _camera_of(env_id: str, size: int) -> Callable[[], np.ndarray]:
    return camera(_kept(env_id), size)


# ------------------------------------------------------------------------------------------- video


def video_bytes(frames: Iterable[np.ndarray], fps: float, form: str) -> bytes:
    """Pictures [height, width, 3] uint8, of even sides -> a video: mp4, webm or gif."""
    if form == "gif":
        tree = Image.Quantize.FASTOCTREE  # median cut would lose the red of a small mark
        images = [Image.fromarray(x).quantize(64, tree) for x in frames]
        buffer, rest = io.BytesIO(), {"save_all": True, "append_images": images[1:], "loop": 0}
        images[0].save(buffer, "GIF", duration=1000 / fps, **rest)
        return buffer.getvalue()
    frames = iter(frames)
    first = next(frames)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"video.{form}")
        options = {"codec": CODECS[form], "macro_block_size": 2, "ffmpeg_log_level": "error"}
        if form == "webm":  # somebody waits for it
            quick = "-deadline realtime -cpu-used 8 -crf 10 -b:v 4M"
            options["output_params"] = quick.split()
        size = first.shape[1::-1]
        writer = imageio_ffmpeg.write_frames(str(path), size, fps=fps, **options)
        writer.send(None)
        for frame in itertools.chain([first], frames):
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        return path.read_bytes()

"""The simulators, imported without their noise and made to run on Python 3.11.

This is the only file that imports them; everything else asks it for an environment.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

from common.args import TrainingError, UserError

import numpy as np

MISSING = (
    "evaluation needs the simulators, and {} cannot be imported: install them on Python 3.10 or "
    "3.11 as the README says, or train without them (--eval-episodes 0)"
)
FIELD = dataclasses.field
PACKAGES = ("gymnasium", "dsrl", "bullet_safety_gym", "pybullet", "safety_gymnasium", "mujoco")


def check_installed() -> None:
    """Look for the simulators without importing them, which would take seconds.

    Raises:
        UserError: one is not installed.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UserError(MISSING.format(package))


@functools.cache
def import_gymnasium() -> Any:
    """Import gymnasium, with dsrl's environments registered; a second call has it at once.

    Raises:
        UserError: a simulator is not installed.
    """
    os.environ["DSRL_SUPPRESS_IMPORT_ERROR"] = "1"  # metadrive is not used and not installed
    os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] = "1"
    warnings.filterwarnings("ignore")
    try:
        import gymnasium

        with mock.patch("dataclasses.field", _field):
            import safety_gymnasium.builder  # noqa: F401
        _leave_out_the_sky()
        # It makes a folder for downloads when it is imported: here it is shown one that is there.
        with mock.patch.dict(os.environ, DSRL_DATASET_DIR=os.path.dirname(__file__)):
            import dsrl  # noqa: F401
    except ImportError as error:
        raise UserError(MISSING.format(error.name or error)) from None
    gymnasium.logger.set_level(gymnasium.logger.ERROR)
    return gymnasium


def _field(*args: Any, default: Any = dataclasses.MISSING, **options: Any) -> Any:
    """``dataclasses.field``, but with arrays as defaults, as they may be up to Python 3.10.

    safety-gymnasium (0.4.0, and 1.0.0 too) has such fields, and Python 3.11 refuses to import it.
    This can go when a release gives them a default_factory.
    """
    if isinstance(default, np.ndarray):
        return FIELD(*args, default_factory=default.copy, **options)
    return FIELD(*args, default=default, **options)


def _leave_out_the_sky() -> None:
    """Drop the skybox from SafetyGym's models; nothing but a picture ever shows it.

    Its six pictures are read at every reset, which takes 0.8 s of 0.85; and a reset is due every
    episode.
    """
    from mujoco import MjModel

    compile_model = MjModel.from_xml_string
    sky = re.compile(r'<texture type="skybox"[^>]*>(</texture>)?')
    MjModel.from_xml_string = lambda xml, assets=None: compile_model(sky.sub("", xml), assets)


def make(env_id: str, **options: Any) -> Any:
    """Make an environment; one of the reader's own may lie in a module of the working folder."""
    gymnasium = import_gymnasium()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where `my_module:MyEnv-v0` is looked for last
    # Bullet wants streams that are files, to have its greetings not seen; a notebook's are none.
    out, err = sys.__stdout__, sys.__stderr__
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        # The checker repeats, at every step, what the tests check once.
        return gymnasium.make(env_id, disable_env_checker=True, **options)


def to_box(actions: np.ndarray, space: Any) -> np.ndarray:
    """Map actions [..., action_dim] in [-1, 1] onto a box, in the box's own type and never beyond.

    They stay as they are where the box is [-1, 1].
    """
    low, high = (np.asarray(x, np.float64) for x in (space.low, space.high))
    return ((low + high) / 2 + (high - low) / 2 * actions).clip(low, high).astype(space.dtype)


def step(env: Any, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, float]:
    """Play an action: observation, reward, terminated, truncated, and cost (0 where none is told).

    Raises:
        TrainingError: the environment failed, or what it returned is of no use; it is named.
    """
    try:
        observation, reward, terminated, truncated, info = env.step(action)
        reward, cost = (np.asarray(x, np.float64).item() for x in (reward, info.get("cost", 0)))
    except Exception as error:  # the environment may be anybody's: it may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise TrainingError(f"{env.spec.id} failed in a step: {reason}") from None
    if not (np.isfinite(reward) and 0 <= cost < np.inf):
        told = f"the reward {reward:g} and the cost {cost:g}"
        raise TrainingError(f"{env.spec.id}: a step has {told}; both must be finite, the cost >= 0")
    return _observed(env, observation), reward, terminated, truncated, cost


def reset(env: Any, seed: int) -> np.ndarray:
    """Start an episode: its first observation, checked as in ``step``.

    A Bullet environment ignores its seed and draws from the global stream, only while it resets.
    """
    np.random.seed(seed)
    return _observed(env, env.reset(seed=seed)[0])


def _observed(env: Any, observation: Any) -> np.ndarray:
    shape = env.observation_space.shape
    try:
        seen = np.array(observation, np.float32)  # a copy: it may be changed in place
        if seen.shape == shape and np.isfinite(seen).all():
            return seen
    except (TypeError, ValueError):
        pass  # no numbers
    raise TrainingError(f"{env.spec.id}: an observation must be finite numbers of shape {shape}")


_kept: dict[str, list[Any]] = {}  # Bullet environments that wait for another episode


@contextlib.contextmanager
def environments(env_id: str, count: int, **options: Any) -> Iterator[list[Any]]:
    """Environments to play one episode each, which goes as in ones just made, to the last bit.

    Making a Bullet environment takes up to 0.2 s, so those are kept and brought back. Others are
    made anew: it takes milliseconds, and a used one of SafetyGym's may round differently.
    """
    kept = _kept.setdefault(env_id, [])
    envs = [kept.pop() if kept else _made(env_id, **options) for _ in range(count)]
    try:
        yield envs
    finally:
        for env in envs:
            if _is_bullet(env):
                _bring_back(env.unwrapped)
                kept.append(env)
            else:
                env.close()


def _is_bullet(env: Any) -> bool:
    from bullet_safety_gym.envs.builder import EnvironmentBuilder

    return isinstance(env.unwrapped, EnvironmentBuilder)


def _made(env_id: str, **options: Any) -> Any:
    env = make(env_id, **options)
    if _is_bullet(env):  # its reset restores this state; by default, what its first reset led to
        env.unwrapped.stored_state_id = env.unwrapped.bc.saveState()
    return env


def _bring_back(env: Any) -> None:
    """Undo what a Bullet environment remembers beyond its reset: motors' targets and contacts."""
    for joint in env.agent.joint_list:
        joint.disable_motor()
    env.agent.set_position((0, 0, 1000))  # far from all that it could touch
    env.bc.performCollisionDetection()

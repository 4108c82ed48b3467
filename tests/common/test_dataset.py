"""Reading datasets: what is accepted, and the sentence with which everything else is refused."""

import dataclasses
import hashlib

from common import dataset as module
from common.args import UserError
from common.dataset import BUNDLED, get_cost_limits, load_dataset, reward_range
from common.download import Offline
from common.tasks import get_task
from common.tools.card import suggested_limits
from tests.conftest import two_armed_arrays, write_dataset

import h5py
import numpy as np
import pytest

TASK = get_task("BallRun")


def test_bundled_dataset_is_whole_and_small():
    path = BUNDLED / "SafetyBallRun.hdf5"
    assert path.stat().st_size <= 3_000_000
    dataset = load_dataset(TASK, "bundled")
    assert dataset.observations.shape == (94_000, 7) and dataset.observations.dtype == np.float32
    assert dataset.actions.shape == (94_000, 2)
    assert (dataset.episode_ends - dataset.episode_starts == TASK.horizon).all()
    assert set(np.unique(dataset.costs)) == {0, 1}
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    told = {"source": "bundled", "path": "common/bundled/SafetyBallRun.hdf5", "sha256": sha256}
    assert dataset.provenance == told


def test_auto_takes_dsrls_file_where_it_is_and_else_says_loudly_what_it_takes(
    tmp_path, monkeypatch, capsys
):
    assert load_dataset(TASK, "auto").source == "bundled"
    said = capsys.readouterr().out
    assert said.count("!!!") == 4 and "BUNDLED STAND-IN" in said
    assert f"{TASK.dsrl_file}: " in said and "cannot be reached" in said
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path))
    path = write_dataset(tmp_path / TASK.dsrl_file, **two_armed_arrays(length=TASK.horizon))
    for data in ("auto", "dsrl"):
        dataset = load_dataset(TASK, data)
        assert (dataset.source, dataset.path) == ("dsrl", str(path))
    assert capsys.readouterr().out == ""


def test_the_bundled_file_stands_in_only_where_the_network_is_not_there(monkeypatch):
    """Not where a file is damaged or refused, where dsrl was asked for, or for another task."""

    def raising(error):
        def fetch(filename):
            raise error(f"{filename}: no")

        monkeypatch.setattr(module, "fetch", fetch)

    raising(Offline)
    assert load_dataset(TASK, "auto").source == "bundled"
    for task, data in ((TASK, "dsrl"), (get_task("CarRun"), "auto")):
        with pytest.raises(Offline, match=task.dsrl_file):
            load_dataset(task, data)
    raising(UserError)
    with pytest.raises(UserError, match=TASK.dsrl_file):
        load_dataset(TASK, "auto")


def test_episodes_end_at_terminals_and_timeouts_and_columns_are_fine(tmp_path):
    arrays = two_armed_arrays(episodes=3, length=10)
    arrays["terminals"][4] = True
    for key in ("rewards", "costs", "terminals", "timeouts"):
        arrays[key] = arrays[key][:, None]
    arrays["timeouts"][-1] = False  # the last episode is not finished
    dataset = load_dataset(TASK, str(write_dataset(tmp_path / "columns.hdf5", **arrays)))
    assert dataset.episode_starts.tolist() == [0, 5, 10, 20]
    assert dataset.episode_ends.tolist() == [5, 10, 20, 30]
    assert dataset.rewards.shape == dataset.costs.shape == (30,)
    sums = [arrays["rewards"][a:b].astype(float).sum() for a, b in ((0, 5), (5, 10), (10, 20))]
    np.testing.assert_allclose(dataset.returns[:3], sums)


def test_actions_beyond_the_box_are_clipped_and_said_so(tmp_path, capsys):
    arrays = two_armed_arrays()
    arrays["actions"][0] = (1.5, -2)
    dataset = load_dataset(TASK, str(write_dataset(tmp_path / "wide.hdf5", **arrays)))
    assert dataset.actions[0].tolist() == [1, -1]
    assert "and are clipped" in capsys.readouterr().out


def test_whole_numbers_and_answers_are_numbers_too(tmp_path):
    arrays = two_armed_arrays()
    plain = load_dataset(TASK, str(write_dataset(tmp_path / "plain.hdf5", **arrays)))
    for key, dtype in (("costs", bool), ("costs", np.uint8), ("timeouts", np.int64)):
        changed = arrays | {key: arrays[key].astype(dtype)}
        other = load_dataset(TASK, str(write_dataset(tmp_path / "other.hdf5", **changed)))
        np.testing.assert_array_equal(plain.costs, other.costs)
        np.testing.assert_array_equal(plain.episode_ends, other.episode_ends)
        assert other.costs.dtype == np.float64


# ------------------------------------------------------------------------------- malformed files


def broken(key, value):
    return lambda arrays: arrays.update({key: value(arrays[key])})


def put(array, value):
    array = array.copy()
    array.flat[7] = value
    return array


BROKEN = {
    "missing keys": (lambda a: (a.pop("costs"), a.pop("rewards")), "lacks rewards, costs"),
    "flat": (broken("observations", lambda x: x[:, 0]), r"observations has shape \[2400\], not"),
    "wide": (broken("rewards", lambda x: np.stack((x, x), 1)), r"rewards has shape \[2400, 2\]"),
    "no width": (broken("actions", lambda x: x[:, :0]), r"actions has shape \[2400, 0\]"),
    "other width": (broken("observations", lambda x: x[:, :5]), r"\[2400, 5\], not \[N, 7\]"),
    "unequal": (broken("rewards", lambda x: x[:-1]), "every step .*rewards 2399, costs 2400"),
    "empty": (lambda a: a.update({k: v[:0] for k, v in a.items()}), "a row for every step"),
    "nan": (broken("observations", lambda x: put(x, np.nan)), "not finite, first in row 1"),
    "too large": (broken("actions", lambda x: put(x.astype(float), 1e300)), "first in row 3"),
    "text": (broken("rewards", lambda x: x.astype("S4")), r"rewards holds \|S4, not numbers"),
    "negative": (broken("costs", lambda x: put(x, -1)), "cost is negative"),
    "no ends": (broken("timeouts", np.zeros_like), "must be set where an episode ends"),
    "endless": (broken("timeouts", lambda x: put(np.zeros_like(x), True)), "2392 steps long"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_dataset_is_refused_in_one_sentence(name, tmp_path):
    arrays = two_armed_arrays()
    change, sentence = BROKEN[name]
    change(arrays)
    path = write_dataset(tmp_path / "broken.hdf5", **arrays)
    with pytest.raises(UserError, match=f"not a dataset of BallRun: .*{sentence}") as error:
        load_dataset(TASK, str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def compressed(path):
    with h5py.File(path, "w") as file:
        for key, array in two_armed_arrays().items():
            file.create_dataset(key, data=array, compression="gzip", chunks=True)


def scratched(path):
    """A few bytes inside a compressed array are turned round."""
    compressed(path)
    with h5py.File(path) as file:
        at = file["observations"].id.get_chunk_info(0).byte_offset + 40
    content = bytearray(path.read_bytes())
    content[at : at + 8] = bytes(255 - byte for byte in content[at : at + 8])
    path.write_bytes(content)


def truncated(path):
    compressed(path)
    path.write_bytes(path.read_bytes()[:-1000])


def in_another_file(how):
    """Its rewards are numbers that lie elsewhere, whose change would leave its SHA-256 as it is."""

    def write(path):
        arrays = two_armed_arrays()
        rewards = arrays.pop("rewards")
        rewards.tofile(path.with_name("raw"))
        write_dataset(path.with_name("other.hdf5"), rewards=rewards)
        layout = h5py.VirtualLayout(rewards.shape, rewards.dtype)
        layout[:] = h5py.VirtualSource("other.hdf5", "rewards", rewards.shape)
        with h5py.File(write_dataset(path, **arrays), "a") as file:
            if how == "link":
                file["rewards"] = h5py.ExternalLink("other.hdf5", "rewards")
            elif how == "virtual":
                file.create_virtual_dataset("rewards", layout)
            else:
                external = [("raw", 0, rewards.nbytes)]
                file.create_dataset("rewards", rewards.shape, "f4", external=external)

    return write


def with_in_place_of_rewards(thing):
    def write(path):
        arrays = two_armed_arrays()
        del arrays["rewards"]
        with h5py.File(write_dataset(path, **arrays), "a") as file:
            if thing is dict:
                file.create_group("rewards")
            else:
                file["rewards"] = thing

    return write


WORDS = np.array(["one"] * 2400, dtype=h5py.string_dtype())
HEAD = b"\x89HDF\r\n\x1a\n" + bytes(500)
MALFORMED = {
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as HDF5"),
    "a head alone": (lambda path: path.write_bytes(HEAD), "cannot be read as HDF5"),
    "a folder": (lambda path: path.mkdir(), "no such file"),
    "nothing": (lambda path: None, "no such file"),
    "scratched": (scratched, "cannot be read as HDF5"),
    "truncated": (truncated, "cannot be read as HDF5"),
    "a group": (with_in_place_of_rewards(dict), "lacks rewards"),
    "a null": (with_in_place_of_rewards(h5py.Empty("f4")), "rewards has shape"),
    "a dangling link": (with_in_place_of_rewards(h5py.SoftLink("/nowhere")), "lacks rewards"),
    "linked": (in_another_file("link"), "rewards lies in another file"),
    "virtual": (in_another_file("virtual"), "rewards lies in another file"),
    "external": (in_another_file("external"), "rewards lies in another file"),
    "words": (with_in_place_of_rewards(WORDS), "rewards holds object, not numbers"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_in_one_sentence(name, tmp_path):
    path = tmp_path / "malformed.hdf5"
    write, sentence = MALFORMED[name]
    write(path)
    with pytest.raises(UserError, match=sentence) as error:
        load_dataset(TASK, str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------- one's own data

OWN = dataclasses.replace(
    TASK,
    name="Mine-v0",
    suite="own",
    cost_limits=(),
    dsrl_file="",
    action_dim=3,
    action_low=(-2.0, 0.1, -3.0),
    action_high=(2.0, 0.7, 11.0),
)


def own_arrays():
    """Actions all over an environment's own box, its very bounds among them."""
    arrays = two_armed_arrays()
    share = np.random.default_rng(0).uniform(size=(2400, 3))
    share[:3] = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5]]
    low, high = np.array(OWN.action_low), np.array(OWN.action_high)
    return arrays | {"actions": low * (1 - share) + high * share}


def test_actions_of_an_own_box_are_mapped_onto_ours(tmp_path, capsys):
    arrays = own_arrays()
    dataset = load_dataset(OWN, str(write_dataset(tmp_path / "own.hdf5", **arrays)))
    assert "clipped" not in capsys.readouterr().out, "rounding is no reason to"
    np.testing.assert_allclose(dataset.actions[:3], [[-1] * 3, [1] * 3, [0] * 3], atol=1e-6)
    assert np.abs(dataset.actions).max() == 1
    low, high = np.array(OWN.action_low), np.array(OWN.action_high)
    back = (low + high) / 2 + dataset.actions * (high - low) / 2
    np.testing.assert_allclose(back, arrays["actions"], atol=1e-5)

    arrays["actions"][7] = (0, 0.8, -3.5)
    dataset = load_dataset(OWN, str(write_dataset(tmp_path / "own.hdf5", **arrays)))
    assert dataset.actions[7].tolist() == [0, 1, -1]
    assert "0.03% of the actions" in capsys.readouterr().out


def test_scale_and_limits_of_own_data_come_from_its_episodes(tmp_path):
    arrays = own_arrays()
    path = write_dataset(tmp_path / "own.hdf5", **arrays)
    dataset = load_dataset(OWN, str(path))
    returns = arrays["rewards"].astype(float).reshape(60, 40).sum(1)
    assert reward_range(OWN, dataset) == pytest.approx((returns.min(), returns.max()))
    assert reward_range(TASK, dataset) == pytest.approx((26.339754, 1327.445557))  # DSRL's

    costs = np.repeat(np.arange(60), 40) > np.tile(np.arange(40), 60)  # 0, 1, ... a few at 40
    dataset = load_dataset(OWN, str(write_dataset(path, **arrays | {"costs": costs})))
    assert suggested_limits(dataset) == (6, 15, 30)
    with pytest.raises(UserError, match="--cost-limits: say what counts as unsafe in Mine-v0"):
        get_cost_limits(OWN, None)
    assert get_cost_limits(OWN, (7.0,)) == (7.0,)
    assert get_cost_limits(TASK, None) == (10, 20, 40)

    dataset = load_dataset(OWN, str(write_dataset(path, **arrays | {"rewards": np.ones(2400)})))
    assert reward_range(OWN, dataset) == (40, 41), "every episode has the same return"


def test_what_is_not_there_is_named():
    with pytest.raises(UserError, match="SafetyBallRun-v0-80-940"):
        load_dataset(TASK, "dsrl")
    with pytest.raises(UserError, match="--data bundled"):
        load_dataset(get_task("CarRun"), "bundled")
    for data in ("auto", "dsrl", "bundled"):
        with pytest.raises(UserError, match=f"needs --data PATH, not {data}"):
            load_dataset(OWN, data)

"""Reading datasets: what is accepted, and the sentence with which everything else is refused."""

import hashlib

import numpy as np
import pytest

from common.cli import UserError
from common.dataset import BUNDLED, TASKS, get_task, load_dataset
from tests.conftest import two_armed_arrays, write_dataset

TASK = get_task("BallRun")


def test_bundled_dataset_is_whole_and_small():
    path = BUNDLED / "SafetyBallRun.hdf5"
    assert path.stat().st_size <= 3_000_000
    dataset = load_dataset(TASK, "bundled")
    assert dataset.observations.shape == (90_000, 7) and dataset.observations.dtype == np.float32
    assert dataset.actions.shape == (90_000, 2)
    assert (dataset.episode_ends - dataset.episode_starts == TASK.horizon).all()
    assert set(np.unique(dataset.costs)) == {0, 1}
    assert dataset.source == "bundled"
    assert dataset.path == "common/bundled/SafetyBallRun.hdf5"
    assert dataset.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_auto_says_loudly_that_it_takes_the_bundled_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path))
    assert load_dataset(TASK, "auto").source == "bundled"
    assert "!!!" in (said := capsys.readouterr().out) and "BUNDLED" in said


def test_auto_takes_dsrls_file_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path))
    write_dataset(tmp_path / TASK.dsrl_file, **two_armed_arrays(length=TASK.horizon))
    assert load_dataset(TASK, "auto").source == "dsrl"
    assert capsys.readouterr().out == ""


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


def test_actions_beyond_the_box_are_clipped_and_said_so(tmp_path, capsys):
    arrays = two_armed_arrays()
    arrays["actions"][0] = (1.5, -2)
    dataset = load_dataset(TASK, str(write_dataset(tmp_path / "wide.hdf5", **arrays)))
    assert dataset.actions[0].tolist() == [1, -1]
    assert "outside [-1, 1] and are clipped" in capsys.readouterr().out


def broken(key, value):
    return lambda arrays: arrays.update({key: value(arrays[key])})


def put(array, value):
    array = array.copy()
    array.flat[7] = value
    return array


BROKEN = {
    "missing key": (lambda a: a.pop("costs"), "the key costs is missing"),
    "flat observations": (broken("observations", lambda x: x[:, 0]), "observations has shape"),
    "wide rewards": (broken("rewards", lambda x: np.stack((x, x), 1)), "rewards has shape"),
    "unequal lengths": (broken("rewards", lambda x: x[:-1]), "rewards has 2399 rows"),
    "nan": (broken("observations", lambda x: put(x, np.nan)), "not finite in row 1"),
    "nan end": (broken("timeouts", lambda x: put(x.astype(float), np.nan)), "not finite in row 7"),
    "inf": (broken("rewards", lambda x: put(x, np.inf)), "not finite in row 7"),
    "text": (broken("rewards", lambda x: x.astype("S4")), "must hold numbers"),
    "no ends": (broken("timeouts", np.zeros_like), "no episode ends"),
    "endless": (broken("timeouts", lambda x: put(np.zeros_like(x), True)), "2392 steps long"),
    "too large": (broken("actions", lambda x: put(x.astype(float), 1e300)), "not finite in row 3"),
    "no width": (broken("actions", lambda x: x[:, :0]), "actions has shape"),
    "scalar": (broken("rewards", lambda x: x[0]), "rewards has shape"),
    "other dimensions": (broken("observations", lambda x: x[:, :5]), "5 dimensions"),
    "negative": (broken("costs", lambda x: put(x, -1)), "cost is negative"),
    "empty": (lambda a: a.update({k: v[:0] for k, v in a.items()}), "observations is empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_dataset_is_refused_in_one_sentence(name, tmp_path):
    arrays = two_armed_arrays()
    change, sentence = BROKEN[name]
    change(arrays)
    path = write_dataset(tmp_path / "broken.hdf5", **arrays)
    with pytest.raises(UserError, match=sentence) as error:
        load_dataset(TASK, str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not HDF5", b"\x89HDF\r\n\x1a\n" + bytes(500)])
def test_a_file_that_is_not_hdf5_is_refused(content, tmp_path):
    path = tmp_path / "data.hdf5"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable HDF5 file"):
        load_dataset(TASK, str(path))


def test_a_group_in_place_of_an_array_is_refused(tmp_path):
    arrays = two_armed_arrays()
    inside = arrays.pop("rewards")
    path = write_dataset(tmp_path / "group.hdf5", **arrays, **{"rewards/values": inside})
    with pytest.raises(UserError, match="rewards is missing"):
        load_dataset(TASK, str(path))


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path))
    with pytest.raises(UserError, match="SafetyBallRun-v0-80-940"):
        load_dataset(TASK, "dsrl")
    with pytest.raises(UserError, match="none for CarRun"):
        load_dataset(get_task("CarRun"), "bundled")
    with pytest.raises(UserError, match="no such file"):
        load_dataset(TASK, str(tmp_path / "nothing.hdf5"))
    with pytest.raises(UserError, match="did you mean BallRun"):
        get_task("ballrunn")


def test_default_segments_can_tell_the_limits_apart():
    for task in TASKS.values():
        assert min(task.cost_limits) * task.segment_length / task.horizon >= 1

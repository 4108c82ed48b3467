"""Reading datasets: what is accepted, and the sentence with which everything else is refused."""

import dataclasses
import hashlib
import tracemalloc
from unittest import mock

import h5py
import numpy as np
import pytest

from algorithms import presa
from common import dataset as module
from common import feedback
from common.cli import UserError
from common.dataset import (
    BUNDLED,
    get_cost_limits,
    load_dataset,
    reward_range,
    suggested_limits,
)
from common.download import Offline
from common.tasks import get_task
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


def test_auto_says_loudly_that_it_takes_the_bundled_file(capsys):
    assert load_dataset(TASK, "auto").source == "bundled"
    said = capsys.readouterr().out
    assert said.count("!!!") == 4 and "BUNDLED STAND-IN" in said
    assert f"{TASK.dsrl_file}: " in said and "cannot be reached" in said


def test_auto_takes_dsrls_file_where_it_is(tmp_path, monkeypatch, capsys):
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


def test_actions_beyond_the_box_are_clipped_and_said_so(tmp_path, capsys):
    arrays = two_armed_arrays()
    arrays["actions"][0] = (1.5, -2)
    dataset = load_dataset(TASK, str(write_dataset(tmp_path / "wide.hdf5", **arrays)))
    assert dataset.actions[0].tolist() == [1, -1]
    assert "outside [-1, 1] and are clipped" in capsys.readouterr().out


def test_whole_numbers_and_answers_are_numbers_too(tmp_path):
    arrays = two_armed_arrays()
    plain = load_dataset(TASK, str(write_dataset(tmp_path / "plain.hdf5", **arrays)))
    for key, dtype in (("costs", bool), ("costs", np.uint8), ("timeouts", np.int64)):
        changed = arrays | {key: arrays[key].astype(dtype)}
        other = load_dataset(TASK, str(write_dataset(tmp_path / "other.hdf5", **changed)))
        np.testing.assert_array_equal(plain.costs, other.costs)
        np.testing.assert_array_equal(plain.episode_ends, other.episode_ends)
        assert other.costs.dtype == np.float64


def broken(key, value):
    return lambda arrays: arrays.update({key: value(arrays[key])})


def put(array, value):
    array = array.copy()
    array.flat[7] = value
    return array


BROKEN = {
    "missing key": (lambda a: a.pop("costs"), "the key costs is missing"),
    "flat observations": (
        broken("observations", lambda x: x[:, 0]),
        r"observations has shape \[2400\], not \[N, dimension\]",
    ),
    "wide rewards": (
        broken("rewards", lambda x: np.stack((x, x), 1)),
        r"rewards has shape \[2400, 2\], not \[N\] or \[N, 1\]",
    ),
    "unequal lengths": (
        broken("rewards", lambda x: x[:-1]),
        r"as many rows as there are steps \(.*rewards 2399, costs 2400",
    ),
    "nan": (
        broken("observations", lambda x: put(x, np.nan)),
        "observations is not finite in 1 rows, the first 1",
    ),
    "nan end": (
        broken("timeouts", lambda x: put(x.astype(float), np.nan)),
        "timeouts is not finite in 1 rows, the first 7",
    ),
    "inf": (
        broken("rewards", lambda x: put(x, np.inf)),
        "rewards is not finite in 1 rows, the first 7",
    ),
    "text": (broken("rewards", lambda x: x.astype("S4")), r"rewards holds \|S4, not numbers"),
    "no ends": (broken("timeouts", np.zeros_like), "no episode ends"),
    "endless": (broken("timeouts", lambda x: put(np.zeros_like(x), True)), "2392 steps long"),
    "too large": (
        broken("actions", lambda x: put(x.astype(float), 1e300)),
        "actions is not finite in 1 rows, the first 3",
    ),
    "no width": (broken("actions", lambda x: x[:, :0]), "actions has shape"),
    "scalar": (broken("rewards", lambda x: x[0]), "rewards has shape"),
    "other dimensions": (
        broken("observations", lambda x: x[:, :5]),
        "observations have 5 dimensions, but BallRun's have 7",
    ),
    "negative": (broken("costs", lambda x: put(x, -1)), "cost is negative"),
    "empty": (lambda a: a.update({k: v[:0] for k, v in a.items()}), "it is empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_dataset_is_refused_in_one_sentence(name, tmp_path):
    arrays = two_armed_arrays()
    change, sentence = BROKEN[name]
    change(arrays)
    path = write_dataset(tmp_path / "broken.hdf5", **arrays)
    with pytest.raises(UserError, match=f"not a dataset of BallRun: [^;]*{sentence}") as error:
        load_dataset(TASK, str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert ";" not in str(error.value), "nothing else is wrong with it"


def test_all_that_is_wrong_stands_in_one_sentence(tmp_path):
    arrays = two_armed_arrays()
    del arrays["costs"]
    arrays["rewards"] = arrays["rewards"].astype("S4")
    arrays["actions"] = arrays["actions"][:, :1]
    arrays["observations"][[3, 8]] = np.nan
    arrays["timeouts"] = put(np.zeros_like(arrays["timeouts"]), True)
    arrays["terminals"] = arrays["terminals"][:, None]
    path = write_dataset(tmp_path / "broken.hdf5", **arrays)
    with pytest.raises(UserError) as error:
        load_dataset(TASK, str(path))
    assert str(error.value) == (
        f"{path}: not a dataset of BallRun: "
        "actions have 1 dimensions, but BallRun's have 2; "
        "rewards holds |S4, not numbers; "
        "the key costs is missing; "
        "observations is not finite in 2 rows, the first 3; "
        "an episode is 2392 steps long, but BallRun's are at most 100: does it lack episode ends?"
    )
    arrays |= {"costs": -np.ones(2399), "terminals": np.full(2400, np.inf)}
    write_dataset(path, **arrays)
    with pytest.raises(UserError) as error:
        load_dataset(TASK, str(path))
    for part in ("costs 2399", "observations is not", "terminals is not finite in 2400 rows"):
        assert part in str(error.value)


# ------------------------------------------------------------------ two hundred malformed files


def whole(path, arrays, compressed=False):
    """A file as DSRL's are written: in one piece, or in chunks made smaller with gzip."""
    options = {"compression": "gzip", "chunks": True} if compressed else {}
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, **options)


def truncated(rng, path, arrays):
    whole(path, arrays, compressed=bool(rng.integers(2)))
    content = path.read_bytes()
    path.write_bytes(content[: rng.integers(len(content))])


def scratched(rng, path, arrays):
    """A few bytes inside a compressed array, or the first ones of the file."""
    whole(path, arrays, compressed=True)
    with h5py.File(path) as file:
        stored = file[str(rng.choice(KEYS))].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    at = int(rng.choice([0, stored.byte_offset + rng.integers(stored.size - 8)]))
    content[at : at + 8] = bytes(255 - byte for byte in content[at : at + 8])
    path.write_bytes(content)


def not_hdf5(rng, path, arrays):
    text = b"observations,actions\n0.1,0.2\n"
    magic = b"\x89HDF\r\n\x1a\n"
    contents = [b"", text, rng.bytes(5000), magic, magic + bytes(500), magic + rng.bytes(500)]
    path.write_bytes(contents[rng.integers(len(contents))])


def not_a_file(rng, path, arrays):
    if rng.integers(2):
        path.mkdir()


def keys_dropped(rng, path, arrays):
    for key in rng.choice(KEYS, rng.integers(1, len(KEYS) + 1), replace=False):
        del arrays[key]
    whole(path, arrays)


def wrong_dtype(rng, path, arrays):
    key, n = rng.choice(KEYS), len(arrays["rewards"])
    pairs = np.zeros(n, [("a", "f4"), ("b", "f4")])
    words = np.array(["one"] * n, dtype=h5py.string_dtype())
    lists = np.empty(n, dtype=h5py.vlen_dtype(np.float32))
    for i in range(n):
        lists[i] = arrays["actions"][i]
    blank = np.zeros(n, "V4")
    kinds = [np.zeros(n, "S4"), pairs, words, lists, blank, arrays["rewards"].astype(complex)]
    arrays[key] = kinds[rng.integers(len(kinds))]
    whole(path, arrays)


def wrong_shape(rng, path, arrays):
    key = rng.choice(KEYS)
    array = arrays[key]
    shapes = [array.T[None], array[..., None, None], array[0], np.stack((array, array), 1)]
    if array.ndim == 2:
        shapes += [array[:, 0], array[:, :0], array[:, :1], np.hstack((array, array)), array.T]
    else:
        shapes += [array[None], array[:, None].repeat(3, 1), array[:, None][:, :0]]
    arrays[key] = shapes[rng.integers(len(shapes))]
    whole(path, arrays)


def wrong_numbers(rng, path, arrays):
    key = rng.choice(KEYS)
    array = arrays[key] = arrays[key].astype(rng.choice([np.float32, np.float64]))
    value = rng.choice([np.nan, np.inf, -np.inf])
    array.flat[rng.integers(array.size, size=rng.integers(1, 20))] = value
    if rng.integers(4) == 0:
        arrays["costs"] = arrays["costs"] - 0.5
    whole(path, arrays, compressed=bool(rng.integers(2)))


def wrong_lengths(rng, path, arrays):
    for key in rng.choice(KEYS, rng.integers(1, len(KEYS)), replace=False):
        arrays[key] = arrays[key][: rng.integers(len(arrays[key]))]
    if rng.integers(4) == 0:
        arrays.update({key: array[:0] for key, array in arrays.items()})
    whole(path, arrays)


def wrong_ends(rng, path, arrays):
    timeouts = arrays["timeouts"]
    if rng.integers(2):  # none at all
        timeouts[:] = False
    else:  # of all but one or two, so that one episode is too long
        timeouts[rng.integers(300) : 1000 + rng.integers(300)] = False
    whole(path, arrays, compressed=bool(rng.integers(2)))


def not_an_array(rng, path, arrays):
    key = str(rng.choice(KEYS))
    inside = arrays.pop(key)
    whole(path, arrays)
    with h5py.File(path, "a") as file:
        kind = rng.integers(7)
        if kind == 0:
            file[f"{key}/values"] = inside
        elif kind == 1:
            file[key] = np.dtype("f4")
        elif kind == 2:
            file[key] = h5py.Empty("f4")
        elif kind == 3:
            file[key] = h5py.SoftLink("/nowhere")
        elif kind == 4:
            file[key] = h5py.SoftLink(f"/{key}")
        elif kind == 5:
            file[key] = h5py.ExternalLink("nowhere.hdf5", key)
        else:
            file[key] = 3.0


def huge(rng, path, arrays):
    """Rows that were never written: of some arrays, or of all of them."""
    rows = int(rng.choice([10**9, 10**10, 10**12, 2**60]))
    keys = KEYS if rng.integers(2) else rng.choice(KEYS, rng.integers(1, 3), replace=False)
    claims = {str(key): (rows, *arrays.pop(key).shape[1:]) for key in keys}
    whole(path, arrays)
    with h5py.File(path, "a") as file:
        for key, shape in claims.items():
            file.create_dataset(key, shape, "f4", chunks=(1000, *shape[1:]))


KEYS = ["observations", "actions", "rewards", "costs", "terminals", "timeouts"]
MALFORMED = [
    *(truncated, truncated, scratched, not_hdf5, not_a_file, keys_dropped, wrong_dtype),
    *(wrong_shape, wrong_numbers, wrong_lengths, wrong_ends, not_an_array, huge),
]


@pytest.mark.parametrize("number", range(200))
def test_a_malformed_file_is_refused_in_one_sentence(number, tmp_path, run_script):
    path = tmp_path / "malformed.hdf5"
    malform, round_ = MALFORMED[number % len(MALFORMED)], number // len(MALFORMED)
    malform(np.random.default_rng(number), path, two_armed_arrays(episodes=50))
    held = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        load_dataset(TASK, str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    if round_ % 5 == 0:  # by script, some of each kind
        flags = {
            presa.main: ("--output-dir", tmp_path / "runs"),
            feedback.main: ("--output", tmp_path / "feedback.npz"),
        }
        for main, output in flags.items():
            assert run_script(main, "--data", path, *output) == (2, "", f"error: {error.value}\n")
    assert sorted(tmp_path.rglob("*")) == held, "nothing is left behind"


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
    with pytest.raises(UserError, match="rewards is not an array"):
        load_dataset(TASK, str(path))


def test_rows_that_were_never_written_are_not_read(tmp_path):
    """They would fill the memory with zeros: 3 GB here, of a file of 10 kB."""
    with h5py.File(path := tmp_path / "claims.hdf5", "w") as file:
        for key, width in {"observations": [7], "actions": [2]}.items():
            file.create_dataset(key, (10**8, *width), "f4", chunks=(1000, *width))
        for key in ("rewards", "costs", "terminals", "timeouts"):
            file.create_dataset(key, 10**8, "f4", chunks=(1000,))
    with pytest.raises(UserError, match="too small to hold the 100000000 rows that it claims"):
        load_dataset(TASK, str(path))


def test_data_for_which_there_is_no_memory_are_refused(two_armed, monkeypatch):
    monkeypatch.setattr(module, "_read", mock.Mock(side_effect=MemoryError("cannot allocate")))
    with pytest.raises(UserError, match=r"two_armed\.hdf5: .*\(cannot allocate\)"):
        load_dataset(TASK, str(two_armed))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_array_is_held_twice(dtype, compressed, tmp_path):
    rng, n, task = np.random.default_rng(0), 300_000, get_task("DroneRun")
    arrays = {
        "observations": rng.normal(size=(n, 17)).astype(dtype).round(2),
        "actions": rng.uniform(-1.01, 1, (n, 4)).astype(dtype).round(2),
        "rewards": rng.normal(size=n).astype(dtype),
        "costs": rng.integers(2, size=n).astype(dtype),
        "terminals": np.zeros(n, dtype),
        "timeouts": (np.arange(n) % 200 == 199).astype(dtype),
    }
    whole(tmp_path / "large.hdf5", arrays, compressed)
    del arrays
    tracemalloc.start()
    try:
        dataset = load_dataset(task, str(tmp_path / "large.hdf5"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    kept = (dataset.observations, dataset.actions, dataset.rewards, dataset.costs)
    assert sum(array.nbytes for array in kept) == n * (17 * 4 + 4 * 4 + 8 + 8)
    assert peak < 1.3 * sum(array.nbytes for array in kept)


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
    assert "0.03% of the actions" in (said := capsys.readouterr().out)
    assert "outside the action box" in said


def test_scale_and_limits_of_own_data_come_from_its_episodes(tmp_path, capsys):
    arrays = own_arrays()
    path = write_dataset(tmp_path / "own.hdf5", **arrays)
    dataset = load_dataset(OWN, str(path))
    returns = arrays["rewards"].astype(float).reshape(60, 40).sum(1)
    assert reward_range(OWN, dataset) == pytest.approx((returns.min(), returns.max()))
    assert reward_range(TASK, dataset) == pytest.approx((26.339754, 1327.445557))  # DSRL's

    costs = np.repeat(np.arange(60), 40) > np.tile(np.arange(40), 60)  # 0, 1, ... a few at 40
    dataset = load_dataset(OWN, str(write_dataset(path, **arrays | {"costs": costs})))
    assert suggested_limits(dataset) == (6, 15, 30)
    with pytest.raises(UserError, match=r"--cost-limits 6 15 30$"):
        get_cost_limits(OWN, dataset, None)
    assert get_cost_limits(OWN, dataset, (7.0,)) == (7.0,)
    assert get_cost_limits(TASK, dataset, None) == (10, 20, 40)

    dataset = load_dataset(OWN, str(write_dataset(path, **arrays | {"rewards": np.ones(2400)})))
    assert reward_range(OWN, dataset) == (40, 41)
    assert f"note: every episode in {path} has the return 40" in capsys.readouterr().out


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="SafetyBallRun-v0-80-940"):
        load_dataset(TASK, "dsrl")
    with pytest.raises(UserError, match="none for CarRun"):
        load_dataset(get_task("CarRun"), "bundled")
    with pytest.raises(UserError, match="no such file"):
        load_dataset(TASK, str(tmp_path / "nothing.hdf5"))
    with pytest.raises(UserError, match="did you mean BallRun"):
        get_task("ballrunn")
    for data in ("auto", "dsrl", "bundled"):
        with pytest.raises(UserError, match=f"needs --data PATH, not {data}"):
            load_dataset(OWN, data)

"""Damaged files: each is of use, or refused in one line, with no code run and nothing lost."""

import io
import json
import math
import os
import random
import shutil

from algorithms import presa
from common.results import Run
from common.tools import benchmark, evaluate, pairs
from tests.conftest import two_armed_arrays, write_dataset

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

TINY = "--cost-limits 20 --num-pairs 30 --bc-steps 4 --steps 4 --hidden-size 4 --log-every 1 "
TINY += "--checkpoint-every 3 --eval-every 4 --device cpu"
READERS = {
    "policy.pt": (evaluate.main, "{folder} --episodes 1"),
    "checkpoint-bc.pt": (presa.main, "--resume {folder}"),
    "checkpoint-align.pt": (presa.main, "--resume {folder}"),
    "results.json": (
        benchmark.main,
        "--only-tables --results {folder}/results.json --output {folder}",
    ),
    "pairs.npz": (presa.main, "--feedback {folder}/pairs.npz --eval-episodes 0 {flags}"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The flags of a tiny run, its folder before its end, with the checkpoints, and after it."""
    where, finish = tmp_path_factory.mktemp("run"), Run.finish
    flags = f"--data {write_dataset(where / 'data.hdf5', **two_armed_arrays())} "

    def kept(run, *results, **more):
        shutil.copytree(run.folder, where / "before")
        finish(run, *results, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish", kept)
        patch.chdir(where)
        patch.setattr("sys.argv", ["presa.py", *(flags + TINY).split(), "--eval-episodes", "1"])
        presa.main()
        (after,) = where.glob("runs/*/*/*")
        told = f"{flags} --num-pairs 30 --cost-limit 20 --output {after}/pairs.npz"
        patch.setattr("sys.argv", ["pairs.py", *told.split()])
        pairs.main()
    return flags + TINY, where / "before", after


class Payload:
    """What runs code where it is unpickled."""

    def __reduce__(self):
        return open, (os.path.abspath("code_was_run"), "w")


def load(name: str, data: bytes):
    """What a file holds, as dicts, lists, tensors and arrays."""
    if name.endswith("pt"):
        return torch.load(io.BytesIO(data), weights_only=True)
    return json.loads(data) if name.endswith("json") else dict(np.load(io.BytesIO(data)))


def save(name: str, held) -> bytes:
    """The bytes of a file that holds this."""
    if name.endswith("json"):
        return json.dumps(held, default=str).encode()
    file = io.BytesIO()
    if name.endswith("npz"):
        np.savez(file, **{key: np.asarray(x) for key, x in held.items()})
    else:
        torch.save(held, file)
    return file.getvalue()


def damage_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Truncated, with a bit flipped, or with a stretch of zeros."""
    at, n, bit = rng.randrange(len(data)), rng.randrange(8, 400), 1 << rng.randrange(8)
    kinds = {"truncated": data[:at], "zeroed": (data[:at] + bytes(n) + data[at + n :])[: len(data)]}
    kinds["flipped"] = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
    kind = rng.choice(list(kinds))
    return kinds[kind], f"{kind} at {at}"


def damage_contents(held, rng: random.Random) -> str:
    """Change one place of nested contents, in place, and say how."""
    keys = list(held) if isinstance(held, dict) else range(len(held))
    (key,) = rng.choices(keys, [4 if isinstance(held[key], dict) else 1 for key in keys])
    value = held[key]
    if isinstance(value, dict | list) and value and rng.random() < 0.7:
        return f"{key} > {damage_contents(value, rng)}"
    if rng.random() < 0.2:
        del held[key]
        return f"{key} is gone"
    # `evil.py` is a script and a module of environments; its name stands for a stranger's code.
    words = ["evil:Foo-v0", os.path.abspath("evil"), "\x1b]0;owned\a", "word", Payload()]
    changed = [*words, None, -1, 10**12, 2**63 - 1, math.nan, [], {}]
    if isinstance(value, torch.Tensor | np.ndarray):
        full = np.full if isinstance(value, np.ndarray) else torch.full
        changed += [full(value.shape, x) for x in (-1, 2**63 - 1, math.nan)]
        changed += [value[None], value.reshape(-1), value.reshape(-1)[:-1]]
    held[key] = rng.choice(words if isinstance(value, str) else changed)
    return f"{key} is {held[key]!r:.60}"


@pytest.mark.parametrize("name", READERS)
def test_fifty_damaged_files(name, runs, tmp_path, run_script, monkeypatch):
    flags, before_its_end, after = runs
    source = before_its_end if name.startswith("checkpoint") else after
    main, words = READERS[name]
    count = 25 if name.startswith("checkpoint") else 50  # of two kinds
    rng, faults, refused = random.Random(name), [], 0
    monkeypatch.chdir(tmp_path)
    # To lay a picture out takes longer than all else here.
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.write_text("a picture"))
    (tmp_path / "evil.py").write_text(f"open('{tmp_path}/code_was_run', 'w')")
    for i in range(count + 1):
        data, how = (source / name).read_bytes(), "whole"
        if i % 5 > 2:
            data, how = damage_bytes(data, rng)
        elif i:
            contents = load(name, data)
            how = damage_contents(contents, rng)
            data = save(name, contents)
        folder = shutil.copytree(source, tmp_path / str(i))
        (folder / name).write_bytes(data)
        held = {path: path.read_bytes() for path in folder.iterdir()}
        try:
            code, out, error = run_script(main, *words.format(folder=folder, flags=flags).split())
        except Exception as traceback:
            code, out, error = -1, "", f"{type(traceback).__name__}: {traceback}"
        lines = error.removesuffix("\n").split("\n")
        seen = [line.rpartition("\r")[2] for line in lines]  # a bar is written over
        right = code == 0 or (code in (1, 2) and len(seen) == 1 and seen[0][:7] == "error: ")
        lost = {p.name for p, x in held.items() if not p.exists() or p.read_bytes() != x}
        lost -= {"metrics.csv"} if code == 1 else set()  # of a run that went on for a while
        if not right or (code and (lost or not i)) or "\x1b" in out + error:
            faults.append(f"{i}, {how}: exit code {code}, lost {lost}, {error}")
        refused += code != 0
    assert not (tmp_path / "code_was_run").exists()
    assert not faults, "\n".join(faults)
    assert refused > 0.6 * count

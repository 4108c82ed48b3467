"""The page that asks people: who may use it, what is on the disk after each answer, and merging."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from algorithms import presa
from common.args import UserError
from common.dataset import load_dataset
from common.feedback import label_pairs, load_pairs
from common.tasks import get_task
from common.tools import label
from tests.conftest import ROOT, assert_refused

import numpy as np
import pytest

TASK = get_task("BallRun")
HERE = "127.0.0.1:5000"
TINY = "--cost-limits 20 --bc-steps 5 --steps 5 --eval-episodes 0 --hidden-size 8 --device cpu"


@pytest.fixture
def open_page(two_armed, tmp_path, monkeypatch, run_script):
    """Start label.py without a server; returns functions that get from its page, and answer."""
    apps = []

    def make_server(host, port, app, threaded):
        assert host == "127.0.0.1" and threaded, "only this machine"
        apps.append(app)
        return SimpleNamespace(port=5000, serve_forever=lambda: None)

    monkeypatch.setattr(label, "make_server", make_server)
    monkeypatch.setattr(label, "clip_frames", lambda task, observations, size, draw: observations)
    monkeypatch.setattr(label, "video_bytes", lambda frames, fps, form: frames.tobytes())

    def start(*flags):
        where = ["--data", two_armed, "--output", tmp_path / "people.npz"]
        code, out, error = run_script(label.main, *where, "--num-pairs", 6, *flags)
        assert code == 0, error
        assert "Ctrl-C" in out
        token = re.search(r"^open http://127.0.0.1:5000/\?token=([\w-]{40,})$", out, re.M)[1]
        client = apps[-1].test_client()

        def get(path="", token=token, **headers):
            query = {"token": token} if token else {}
            return client.get(f"/{path}", query_string=query, headers={"Host": HERE} | headers)

        def answer(number, choice, revision=None, origin=f"http://{HERE}"):
            revision = revision_of(get(number)) if revision is None else revision
            form = dict(zip(("better", "left", "right"), choice, strict=True))
            form |= {"revision": revision, "seconds": 1.5}
            headers, query = {"Host": HERE, "Origin": origin}, {"token": token}
            return client.post(f"/{number}", query_string=query, data=form, headers=headers)

        return SimpleNamespace(get=get, answer=answer, file=tmp_path / "people.npz")

    return start


def revision_of(page) -> str:
    return re.search(r'"revision", "(\w*)"', page.text)[1]


def answers_in(path: Path) -> list[list[int]]:
    """Which did better, and of each whether it was safe."""
    return label.read_file(path)[1][:, 2:5].astype(int).tolist()


def test_only_the_page_with_its_token_is_answered(open_page):
    page, evil = open_page(), "evil.example:5000"  # whose name points at this machine
    assert page.get().status_code == page.get(Host="localhost:5000").status_code == 200
    strangers = [{"token": token} for token in (None, "x" * 43, "é")]
    strangers += [{"Host": evil}, {"Host": "127.0.0.1"}, {"Origin": f"http://{evil}"}]
    for path in ("", "0", "clip/0/1"):
        for stranger in (
            *strangers,
            {"Origin": "null"},
            {"Host": evil, "Origin": f"http://{HERE}"},
        ):
            assert page.get(path, **stranger).status_code == 403, (path, stranger)
    refused = page.answer(0, (0, 1, 1), "", "http://127.0.0.1:5001")
    assert refused.status_code == 403 and not page.file.exists()
    assert page.answer(0, (0, 1, 1)).status_code == 200 and page.file.exists()


def test_each_answer_is_on_the_disk_in_the_form_that_training_reads(
    open_page, two_armed, tmp_path, run_script
):
    page = open_page("--seed", 3, "--labeller", "Ada", "--segment-length", 10)
    drawn = label_pairs(load_dataset(TASK, str(two_armed)), TASK, 3, (20.0,), 10, 1000)
    for number, choice in enumerate([(1, 1, -1), (0, 1, 1), (-1, 0, 0), (0, -1, 1)]):
        assert f"pair {number + 1} of 6" in page.get().text
        page.answer(number, choice)
        assert answers_in(page.file)[number:] == [list(choice)]
    pairs, length = load_pairs(page.file, load_dataset(TASK, str(two_armed)), 10_000, 20)
    assert length == 10 and pairs["preference"].tolist() == [[1, 0, -1, 0]]
    assert pairs["safe_label"].tolist() == [[[1, -1], [1, 1], [0, 0], [-1, 1]]]
    assert (pairs["segment_starts"] == drawn["segment_starts"][:4]).all(), "as synthetic ones"
    with np.load(page.file) as held:
        assert set(held) == {"preference", "safe_label", "segment_starts", "seconds", *label.FLAGS}
        assert held["seconds"].tolist() == [1.5] * 4 and held["labeller"] == "Ada"
        assert held["cost_limit"] == 20 and held["seed"] == 3 and held["task"] == "BallRun"
    trained = ["--data", two_armed, "--feedback", page.file, "--output-dir", tmp_path / "runs"]
    code, _, error = run_script(presa.main, *TINY.split(), *trained)
    assert code == 0, error


def test_an_answer_sent_twice_or_from_a_page_that_is_not_the_newest(open_page):
    page = open_page()
    assert page.answer(0, (0, 1, 1), "").status_code == 200
    once = page.file.read_bytes()
    assert page.answer(0, (0, 1, 1), "").status_code == 200, "the reply was lost, say"
    assert page.file.read_bytes() == once
    seen = revision_of(page.get())
    assert page.answer(1, (1, -1, 1), seen).status_code == 200
    after = page.file.read_bytes()
    for number, choice in ((1, (0, -1, 1)), (0, (1, 1, 1))):
        stale = page.answer(number, choice, seen)
        assert stale.status_code == 409 and "another tab" in stale.text
    assert page.answer(5, (0, 1, 1)).status_code == 409, "not its turn"
    assert page.answer(2, (7, 1, 1)).status_code == 500, "no answer"
    assert page.file.read_bytes() == after
    back = page.get(0).text
    checked = re.findall(r'name="(\w+)" value="(-?\d)"[^>]*checked', back)
    assert checked == [("left", "1"), ("right", "1"), ("better", "0")]
    assert page.answer(0, (-1, 0, -1)).status_code == 200, "changed"
    assert answers_in(page.file) == [[-1, 0, -1], [1, -1, 1]]
    page.file.unlink()
    assert page.answer(2, (0, 1, 1), seen).status_code == 409, "nothing is held in memory"


def test_a_full_disk_keeps_what_was_there(open_page, monkeypatch):
    page = open_page()
    page.answer(0, (0, 1, 1))
    before = page.file.read_bytes()

    def full(self, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        said = page.answer(1, (1, 0, 0))
    assert said.status_code == 507 and "No space left on device" in said.text
    assert page.file.read_bytes() == before and len(list(page.file.parent.glob("*.part"))) == 0
    assert "pair 2 of 6" in page.get().text
    assert page.answer(1, (1, 0, 0)).status_code == 200 and len(answers_in(page.file)) == 2


def test_it_goes_on_under_the_same_flags_and_no_others(open_page, two_armed, tmp_path, run_script):
    page = open_page()
    page.answer(0, (0, 1, 1))
    page.answer(1, (1, 0, 0))
    before = page.file.read_bytes()
    other = tmp_path / "other.hdf5"
    other.write_bytes(two_armed.read_bytes() + b"another SHA-256")
    base = f"--data {two_armed} --output {page.file}".split()
    for flags, said in (
        ("--seed 1", "--seed: "),
        ("--segment-length 10", "--segment-length: "),
        ("--cost-limit 10", "--cost-limit: "),
        ("--labeller Ada", "--labeller: "),
        ("--num-pairs 1", "--num-pairs 1: "),
        (f"--data {other}", "--data: "),
        (f"--output {two_armed}", "two_armed.hdf5: not a file that label.py wrote"),
        (f"--output {tmp_path}", "--output"),
        ("--segment-length 0.001", "--segment-length 0.001: must be 1 step"),
        ("--port 80", "--port 80: must lie between 1024 and 65535"),
        ("--draw nowhere:draw", "--draw nowhere:draw"),
    ):
        assert_refused(run_script(label.main, *base, *flags.split()), said)
    assert page.file.read_bytes() == before
    assert "pair 3 of 8" in open_page("--num-pairs", 8).get().text
    page = open_page("--num-pairs", 2)
    done = page.get().text
    assert "All 2 pairs are answered" in done and "<video" not in done
    assert f"--task BallRun --data {two_armed} --feedback {page.file} --cost-limits 20" in done


def test_one_thread_draws_all_clips_and_ahead_of_time(open_page, two_armed, monkeypatch):
    drawn = []

    def clip_frames(task, observations, size, draw):
        drawn.append((threading.get_ident(), observations))
        time.sleep(0.05)  # time for a second thread to be started
        return observations

    monkeypatch.setattr(label, "clip_frames", clip_frames)
    page, dataset = open_page("--segment-length", 10), load_dataset(TASK, str(two_armed))
    starts = label_pairs(dataset, TASK, 0, (20.0,), 10, 6)["segment_starts"]
    page.get()
    until = time.time() + 20
    while len(drawn) < 4 and time.time() < until:
        time.sleep(0.01)
    assert len(drawn) == 4, "this pair's and the next one's"
    for number, side in np.ndindex(2, 2):
        clip = dataset.observations[starts[number, side] :][:10]
        assert page.get(f"clip/{number}/{side}").data == clip.tobytes()
    assert len(drawn) == 4, "once each"
    page.get("clip/4/0")
    assert len({thread for thread, _ in drawn} - {threading.get_ident()}) == 1

    def fail(*_):
        raise UserError("--draw my:picture: gives no picture")

    monkeypatch.setattr(label, "clip_frames", fail)
    said = page.get("clip/2/0")
    assert said.status_code == 500 and said.text == "--draw my:picture: gives no picture"


def write(path: Path, starts, answers, **flags) -> Path:
    """A file of answers, each one a second."""
    fixed = {"task": "BallRun", "dataset_sha256": "1", "segment_length": 10, "cost_limit": 20.0}
    table = np.column_stack((np.reshape(starts, (-1, 2)), answers, np.ones(len(answers))))
    label.write_file(path, fixed | {"seed": 0, "labeller": path.stem} | flags, table)
    return path


def test_merging_keeps_what_is_agreed_and_says_how_much_that_is(tmp_path, run_script):
    """By hand: 7 of 10 preferences alike, 0.6 × 0.7 + 0.4 × 0.3 = 0.54 by chance."""
    better_a, better_b = [0] * 6 + [1] * 4 + [-1, 0], [0] * 5 + [1] * 3 + [0] * 2 + [1, -1]
    safe_a, safe_b = [[1, -1]] * 10 + [[0, 1], [-1, 0]], [[1, -1]] * 10 + [[1, -1], [0, 0]]
    starts = [(i, 2 * i) for i in range(12)]
    by_a, by_b = np.column_stack((better_a, safe_a)), np.column_stack((better_b, safe_b))
    a = write(tmp_path / "ada.npz", [*starts, (50, 60)], [*by_a, (1, 0, 1)])
    b = write(tmp_path / "bob.npz", [(60, 50), *starts], [(0, 1, 1), *by_b])
    both = tmp_path / "both.npz"
    code, out, error = run_script(label.main, "--merge", a, b, "--output", both)
    assert code == 0, error
    assert "12 pairs in both" in out
    assert "preference  7 of 10 alike (70%), Cohen's kappa 0.35" in out
    # 20 of 21: by chance 10/21 × 10/21 + 11/21 × 11/21, with 11 of each called unsafe or safe
    assert "safety      20 of 21 alike (95%), Cohen's kappa 0.90" in out
    flags, table = label.read_file(both)
    assert flags["labeller"] == "ada + bob" and len(table) == 14
    better = [0] * 5 + [-1] + [1] * 2 + [-1] * 2 + [1, 0]  # contradictions: cannot tell
    assert table[:12, 2].tolist() == better, "who can tell serves for who cannot"
    assert table[10:12, 3:5].tolist() == [[1, 0], [-1, 0]]
    assert table[12:].tolist() == [[50, 60, 1, 0, 1, 1], [60, 50, 0, 1, 1, 1]]
    assert table[0].tolist() == [0, 0, 0, 1, -1, 2], "seconds of both"
    c = write(tmp_path / "cy.npz", [(70, 80)], [(1, 1, 1)])
    out = run_script(label.main, "--merge", a, b, c, "--output", tmp_path / "three.npz")[1]
    assert out.count("no pair answered by both") == 4 and out.count("kappa") == 2
    assert len(label.read_file(tmp_path / "three.npz")[1]) == 15
    assert_refused(run_script(label.main, "--merge", a, b, "--output", both), "not there yet")
    other = ["--output", tmp_path / "other.npz"]
    assert_refused(run_script(label.main, "--merge", a, *other), "--merge: give two files")
    assert_refused(run_script(label.main, "--merge", a, tmp_path / "no.npz", *other), "no.npz: not")
    for key, value in (("dataset_sha256", "2"), ("segment_length", 9), ("cost_limit", 10.0)):
        d = write(tmp_path / "dee.npz", [(1, 2)], [(1, 1, 1)], **{key: value})
        assert_refused(run_script(label.main, "--merge", a, d, *other), f"{d}: {key} must be")


@pytest.fixture
def started():
    """Processes, none of which outlives its test."""
    processes = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def browser():
    """A real one."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        names = (playwright.chromium.executable_path, "chromium", "chromium-browser")
        found = next(filter(None, map(shutil.which, (*names, "google-chrome"))), None)
        if found is None:
            pytest.skip("no Chromium is here: playwright install chromium")
        sandbox = ["--no-sandbox"] * (os.geteuid() == 0)
        opened = playwright.chromium.launch(executable_path=found, args=sandbox)
        yield opened
        opened.close()


def test_a_person_whose_program_is_killed_in_the_middle(browser, started, tmp_path, run_script):
    file, rng = tmp_path / "people.npz", np.random.default_rng(0)
    expected = rng.integers(-1, 2, (20, 3)).tolist()
    arrows = {0: "ArrowLeft", 1: "ArrowRight", -1: "ArrowDown"}
    keys = {"better": arrows, "left": {1: "a", -1: "s", 0: "d"}, "right": {1: "j", -1: "k", 0: "l"}}
    flags = f"--data bundled --num-pairs 20 --segment-length 0.2 --size 180 --output {file}"
    page, asked = browser.new_page(viewport={"width": 1280, "height": 800}), []
    page.on("request", lambda request: asked.append(request.url))

    def start() -> subprocess.Popen:
        script = [sys.executable, ROOT / "common/tools/label.py", *flags.split()]
        process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
        started.append(process)
        page.goto(next(line for line in process.stdout if line.startswith("open ")).split()[1])
        return process

    def arrive(number: int) -> None:
        page.get_by_text(f"pair {number + 1} of 20").wait_for()
        page.wait_for_function("document.querySelector('output')?.textContent === ''")

    def choose(number: int, by_keys: bool) -> None:
        arrive(number)
        for name, value in zip(keys, expected[number], strict=True):
            if by_keys:
                page.keyboard.press(keys[name][value])
            else:
                page.locator(f"label:has([name={name}][value='{value}'])").click()
        page.keyboard.press(" ") if by_keys else page.get_by_text("Next").click()

    process = start()
    page.wait_for_function("[...document.querySelectorAll('video')].every(x => x.currentTime > .1)")
    left, right = page.evaluate("[...document.querySelectorAll('video')].map(x => x.currentTime)")
    assert abs(left - right) < 0.1, "started together"
    assert page.evaluate("document.documentElement.scrollHeight") <= 800
    page.keyboard.press("a")
    page.keyboard.press("Enter")  # nothing yet: two questions are open
    for number in range(12):
        choose(number, by_keys=number % 3 > 0)
    arrive(12)
    for number in (11, 10, 9):
        page.keyboard.press("Backspace")
        arrive(number)
    assert page.locator(":checked").count() == 3
    expected[9] = [1, -1, 1]
    choose(9, by_keys=True)
    arrive(10)
    assert answers_in(file) == expected[:12]
    process.kill()
    process.wait()
    page.keyboard.press("Enter")
    page.get_by_text("label.py has ended").wait_for()
    assert answers_in(file) == expected[:12]
    process = start()
    for number in range(12, 20):
        choose(number, by_keys=number % 2 > 0)
    page.get_by_text("All 20 pairs are answered").wait_for()
    assert answers_in(file) == expected
    assert (label.read_file(file)[1][:, 5] > 0).all(), "seconds"
    here = re.compile(r"(blob:)?http://127\.0\.0\.1:\d+/|data:")
    assert asked and all(map(here.match, asked)), "nothing from elsewhere"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0 and "20 of 20" in process.stdout.read()
    trained = ["--data", "bundled", "--feedback", file, "--output-dir", tmp_path / "runs"]
    code, _, error = run_script(presa.main, *TINY.split(), *trained)
    assert code == 0, error

"""Ask people which of two clips did better and whether each was safe; merge what several answer.

    python common/tools/label.py --task BallRun --data bundled --output people.npz
    python common/tools/label.py --merge a.npz b.npz --output both.npz

The first prints an address to open in a browser; Ctrl-C ends it, and the same command goes on. The
pairs are those of synthetic feedback with the same seed. ``common/feedback.py`` has the file's
form; beside it stand ``seconds`` [P], that each answer took, and flags.
"""

import functools
import io
import itertools
import logging
import os
import secrets
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.args import UserError, parse_args, run_main, whole_file
from common.dataset import file_sha256, load_dataset
from common.feedback import label_pairs
from common.tasks import get_task
from common.tools import check_output, pairs
from common.tools.drawing import FPS, clip_frames, load_draw, prepare, video_bytes, what_counts

import numpy as np
from flask import Flask, Response, render_template_string, request, send_file
from werkzeug.serving import make_server

FLAGS = ("task", "dataset_sha256", "segment_length", "cost_limit", "seed", "labeller")
# The answers to P pairs are a table [P, 6]: both starts, preference, both safe labels, seconds.


@dataclass
class Args(pairs.Args):
    """Ask people about pairs of segments, or merge what several have answered."""

    output: Path = Path("people.npz")
    """the file to write; where it is there already, go on after its last answer"""
    num_pairs: int = 200
    """pairs of segments to ask about"""
    labeller: str = "anonymous"
    """who answers"""
    port: int = 0
    """of the page's address, which only this machine can reach; 0: any free one"""
    size: int = 480
    """width of a clip, pixels"""
    draw: str | None = None
    """my_module:function that makes a picture of an observation, for your own environment"""
    merge: tuple[Path, ...] = ()
    """files to merge into --output: nobody is asked, and no other flag is read"""


def read_file(path: Path) -> tuple[dict, np.ndarray]:
    """The ``FLAGS`` of a file that this tool wrote, and its table; another is a UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            flags = {key: file[key].item() for key in FLAGS}
            columns = ("segment_starts", "preference", "safe_label", "seconds")
            return flags, np.column_stack([file[key] for key in columns]).astype(float)
    except Exception as error:  # a damaged archive can raise nearly anything
        raise UserError(f"{path}: not a file that label.py wrote ({error})") from None


def write_file(path: Path, flags: dict, table: np.ndarray) -> None:
    """Write all answers: the file is the new one or, where the disk is full, still the old one."""
    whole, buffer = table[:, :5].astype(np.int64), io.BytesIO()
    labels = {"segment_starts": whole[:, :2], "preference": whole[:, 2], "safe_label": whole[:, 3:]}
    np.savez_compressed(buffer, **labels, seconds=table[:, 5], **flags)
    with whole_file(path) as part:
        part.write_bytes(buffer.getvalue())


def agreement(a: np.ndarray, b: np.ndarray, cannot_tell: int) -> str:
    """How many of two people's answers, [.] each, are alike where both can tell; Cohen's kappa."""
    told = (a != cannot_tell) & (b != cannot_tell)
    a, b = a[told], b[told]
    if not len(a):
        return "no pair answered by both"
    alike = (a == b).mean()
    chance = sum((a == value).mean() * (b == value).mean() for value in np.unique(a))
    kappa = f"{(alike - chance) / (1 - chance):.2f}" if chance < 1 else "undefined: one answer only"
    return f"{(a == b).sum()} of {len(a)} alike ({alike:.0%}), Cohen's kappa {kappa}"


def agreed(answers: np.ndarray, cannot_tell: int) -> int:
    """The answer of all who could tell; else ``cannot_tell``."""
    told = set(answers.tolist()) - {cannot_tell}
    return told.pop() if len(told) == 1 else cannot_tell


def merge(paths: tuple[Path, ...], output: Path) -> None:
    """Write the answers of several files as one, each pair once; print how far each two agree.

    Raises:
        UserError: the files do not belong together, or ``output`` is there already.
    """
    if len(paths) < 2 or output.exists():
        raise UserError("--merge: give two files or more, and an --output that is not there yet")
    files = [(path, *read_file(path)) for path in paths]
    flags = files[0][1]
    for path, of_file, _ in files:
        for key in ("dataset_sha256", "segment_length", "cost_limit"):
            if of_file[key] != flags[key]:
                raise UserError(f"--merge {path}: {key} must be {flags[key]}, as in {paths[0]}")
    for (path_a, _, a), (path_b, _, b) in itertools.combinations(files, 2):
        in_a, in_b = np.nonzero((a[:, None, :2] == b[:, :2]).all(-1))
        a, b = a[in_a], b[in_b]
        print(f"{path_a} and {path_b}: {len(a)} pairs in both")
        print(f"  preference  {agreement(a[:, 2], b[:, 2], -1)}")
        print(f"  safety      {agreement(a[:, 3:5].ravel(), b[:, 3:5].ravel(), 0)}")
    joined, merged = np.concatenate([table for _, _, table in files]), []
    for pair in dict.fromkeys(map(tuple, joined[:, :2])):  # in order, each once
        better, left, right, seconds = joined[(joined[:, :2] == pair).all(1), 2:].T
        labels = (agreed(better, -1), agreed(left, 0), agreed(right, 0))
        merged.append([*pair, *labels, seconds.sum()])
    labeller = " + ".join(str(of_file["labeller"]) for _, of_file, _ in files)
    write_file(output, flags | {"labeller": labeller}, np.array(merged))
    print(f"{output}: {len(merged)} pairs, answered by {labeller}")


def main() -> None:
    args = parse_args(Args, at_least={"seed": 0, "port": 0, "size": 64})
    output, total = args.output, args.num_pairs
    check_output(output)
    if args.merge:
        return merge(args.merge, output)
    if args.port and not 1024 <= args.port < 2**16:
        raise UserError(f"--port {args.port}: must lie between 1024 and 65535, or be 0")

    # 1. The pairs, and what is answered of them.
    task, draw = get_task(args.task, args.env_id), load_draw(args.draw)
    if draw is None and task.name.endswith("Velocity"):  # which MuJoCo draws
        prepare(task)
    if args.cost_limit is None and task.suite == "own":
        raise UserError("--cost-limit: say what counts as unsafe (common/tools/card.py helps)")
    limit = task.cost_limits[1] if args.cost_limit is None else args.cost_limit
    dataset = load_dataset(task, args.data)
    length, longest = args.segment_length, (dataset.episode_ends - dataset.episode_starts).max()
    length = round(length * longest if length <= 1 else length)
    if length < 1:
        raise UserError(f"--segment-length {args.segment_length}: must be 1 step or more")
    starts = label_pairs(dataset, task, args.seed, (limit,), length, total)["segment_starts"]
    settings = (task.name, dataset.sha256, length, limit, args.seed, args.labeller)
    flags = dict(zip(FLAGS, settings, strict=True))

    def read() -> tuple[np.ndarray, str]:
        """The table of --output [P, 6], and a hash that tells its revisions apart."""
        if not output.exists():
            return np.zeros((0, 6)), ""
        revision, (held, table) = file_sha256(output), read_file(output)
        for key, value in flags.items():
            if held[key] != value:
                flag = "--data" if key == "dataset_sha256" else f"--{key.replace('_', '-')}"
                told = f"{output} was made with {key} {held[key]}, not {value}"
                raise UserError(f"{flag}: {told}; give the same, or another --output")
        if not np.array_equal(table[:, :2], starts[: len(table)]):
            raise UserError(f"--num-pairs {total}: {output} has more or others; give as many")
        return table, revision

    read()  # says now what is wrong with the file

    # 2. The clips. One thread draws them all: simulators are not thread-safe.
    def draw_clip(start: int) -> bytes:
        observations = dataset.observations[start : start + length]
        return video_bytes(clip_frames(task, observations, args.size, draw), FPS, "webm")

    thread = ThreadPoolExecutor(1)
    clips = functools.lru_cache(8)(lambda n: [thread.submit(draw_clip, x) for x in starts[n]])

    # 3. The page. Nothing is held in memory: an answer carries the revision of the file that its
    # page has seen, and a page that has not seen the newest changes nothing.
    app, token, writing = Flask(__name__), secrets.token_urlsafe(), threading.Lock()
    name = f"--env-id {args.env_id}" if args.env_id else f"--task {task.name}"
    train = f"{name} --data {args.data} --feedback {output} --cost-limits {limit:g}"
    texts = {"what": what_counts(task, limit, length), "train": train, "total": total}

    def say(sentence: object, code: int = 200) -> Response:
        return Response(str(sentence), code, mimetype="text/plain")

    app.register_error_handler(500, lambda error: say(error.original_exception, 500))

    @app.before_request
    def check() -> Response | None:
        # A site could have its own name point at this machine, or have its page post to this one.
        host, given = request.headers.get("Host", ""), request.args.get("token", "")
        origin = request.headers.get("Origin", f"http://{host}").removeprefix("http://")
        ours = {host, origin} <= {f"127.0.0.1:{server.port}", f"localhost:{server.port}"}
        if not ours or not secrets.compare_digest(given.encode(), token.encode()):
            return say("Open the address that label.py printed last; no other will do.", 403)

    @app.get("/")
    @app.get("/<int:number>")
    def page(number: int = total) -> str:
        table, revision = read()
        number = min(number, len(table))
        for ahead in range(number, min(number + 2, total)):
            clips(ahead)
        answer = table[number : number + 1, 2:5].tolist()  # [] where there is none yet
        pair = {"number": number, "answer": answer, "revision": revision}
        return render_template_string(PAGE, **texts, **pair)

    @app.get("/clip/<int:number>/<int:side>")
    def clip(number: int, side: int) -> Response:
        return send_file(io.BytesIO(clips(number)[side].result()), "video/webm")

    @app.post("/<int:number>")
    def answer(number: int) -> Response:
        given = request.form
        choice = [("-1", "0", "1").index(given[key]) - 1 for key in ("better", "left", "right")]
        with writing:
            table, revision = read()
            if table[number : number + 1, 2:5].tolist() == [choice]:
                return say("It was sent twice, or looked at again.")
            if given["revision"] != revision or number not in range(min(len(table) + 1, total)):
                return say("This pair was answered in another tab; reload this page.", 409)
            row = [*starts[number], *choice, float(given["seconds"])]
            try:
                write_file(output, flags, np.vstack((table[:number], row, table[number + 1 :])))
            except OSError as error:
                return say(f"{output}: {error.strerror}; mend that, then press Next again.", 507)
        return say("It is on the disk.")

    # 4. Until Ctrl-C, which the server takes for its end.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # requests have the token in them
    server = make_server("127.0.0.1", args.port, app, threaded=True)
    print(f"open http://127.0.0.1:{server.port}/?token={token}\nCtrl-C ends this", flush=True)
    server.serve_forever()
    with writing:  # no answer is left half written
        print(f"\n{output}: {len(read()[0])} of {total} pairs are answered")


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Which did better?</title>
<link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; accent-color: #2f6fdb }
  body { max-width: 1160px; margin: 0 auto; padding: 12px; text-align: center; text-wrap: balance }
  main { display: grid; grid-template-columns: 1fr 1fr; gap: 24px }
  video { width: 100%; height: 46vh; object-fit: contain; background: #8882; border-radius: 8px }
  label, button { display: inline-block; font: inherit; padding: 6px 14px; margin: 0 4px;
    border: 1px solid #8888; border-radius: 8px; cursor: pointer }
  label:has(:checked) { background: #2f6fdb; color: white }
  kbd { font-size: 13px; opacity: .7; margin-left: 6px }
</style>
{% macro choice(name, place, value, text, key, sign=key) %}
<label><input type="radio" name="{{ name }}" value="{{ value }}" data-key="{{ key }}" required
  {{ "checked" if answer and answer[0][place] == value }}> {{ text }}<kbd>{{ sign }}</kbd></label>
{% endmacro %}
<form autocomplete="off">
  {% if number < total %}
  pair {{ number + 1 }} of {{ total }}
  <progress style="width: 100%" max="{{ total }}" value="{{ number }}"></progress>
  <p>{{ what }}</p>
  <main>
    {% for side, keys in (("left", "asd"), ("right", "jkl")) %}
    <section>
      <video muted loop></video>
      <p>Was it safe?</p>
      {{ choice(side, loop.index, 1, "Safe", keys[0]) }}
      {{ choice(side, loop.index, -1, "Unsafe", keys[1]) }}
      {{ choice(side, loop.index, 0, "Cannot tell", keys[2]) }}
    </section>
    {% endfor %}
  </main>
  <p>Which did better?</p>
  {{ choice("better", 0, 0, "Left", "arrowleft", "←") }}
  {{ choice("better", 0, -1, "Cannot tell", "arrowdown", "↓") }}
  {{ choice("better", 0, 1, "Right", "arrowright", "→") }}
  {% else %}
  <p>All {{ total }} pairs are answered. Ctrl-C ends label.py; to train on the answers:</p>
  <pre>python algorithms/presa.py {{ train }}</pre>
  {% endif %}
  <p>
    <button data-key="backspace" value="-1" formnovalidate>Back<kbd>Backspace</kbd></button>
    {% if number < total %}
    <button data-key="r" type="button" onclick="replay()">Replay<kbd>r</kbd></button>
    <button data-key="enter" value="1">Next<kbd>Enter</kbd></button>
    {% endif %}
  </p>
  <output>The clips are being drawn …</output>
</form>
<script>
  const form = document.forms[0], told = document.querySelector("output");
  const videos = [...document.querySelectorAll("video")];
  let shown = 0;  // when both clips were there, ms

  async function ask(path, options) {  // the reply; null where there is none, or a refusal
    const reply = await fetch(path + location.search, options).catch(() => null);
    if (!reply) told.textContent = "label.py has ended: start it again.";
    else if (!reply.ok) told.textContent = await reply.text();
    return reply?.ok ? reply : null;
  }
  function replay() {
    for (const video of videos) { video.currentTime = 0; video.play(); }
  }
  onload = async () => {
    for (const [side, video] of videos.entries()) {
      const clip = await ask(`clip/{{ number }}/${side}`);
      if (!clip) return;
      video.src = URL.createObjectURL(await clip.blob());
    }
    told.textContent = "";
    shown = performance.now();
    replay();
  };
  onkeydown = (event) => {
    const key = event.key === " " ? "enter" : event.key.toLowerCase();
    const button = document.querySelector(`[data-key="${CSS.escape(key)}"]`);
    if (!button || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    button.click();
  };
  form.onsubmit = async (event) => {
    event.preventDefault();
    const to = {{ number }} + Number(event.submitter.value);
    if (videos.length && form.checkValidity()) {
      const answer = new FormData(form);
      answer.set("revision", "{{ revision }}");
      answer.set("seconds", (performance.now() - shown) / 1000);
      if (!await ask("{{ number }}", { method: "POST", body: answer })) return;
    }
    if (to >= 0) location = to + location.search;
  };
</script>
"""


if __name__ == "__main__":
    run_main(main)
    os._exit(0)  # does not wait for a clip that is half drawn

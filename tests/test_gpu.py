"""What a GPU does, as far as a CPU can tell.

A captured step, played back, trains the same policy as the plain one; and torch's own model of a
GPU, tensors without data, takes the losses through the two maps that training puts around them.
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from algorithms import bc_all, bc_safe, bc_safe_seg, binary_alignment, presa, unified_comparison
from common.gpu import EAGER_STEPS, captured, log_sigmoid

each_method = pytest.mark.parametrize(
    "module",
    (presa, bc_all, bc_safe, bc_safe_seg, binary_alignment, unified_comparison),
    ids=lambda module: module.__name__.rpartition(".")[2],
)


class Tape(TorchDispatchMode):
    """What a CUDA graph is, for a CPU: a list of operations on fixed memory.

    While it records, nothing is done for good: what is written to, and every registered generator,
    is put back afterwards. ``replay`` does the operations again, on the same tensors and without
    the Python around them. It stands in for ``torch.cuda.CUDAGraph``; streams, memory pools and
    kernels are not in it.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.generators, self.before, self.replays = [], [], [], 0

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def __enter__(self):
        self.before = [(g.set_state, g.get_state()) for g in self.generators]
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for restore, value in reversed(self.before):
                restore(value)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert torch.Tag.data_dependent_output not in function.tags, f"{function}: the host waits"
        drawn = {x._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Generator)}
        assert drawn <= {g._cdata for g in self.generators}, f"{function}: who draws?"
        for place, argument in enumerate(function._schema.arguments):
            if argument.alias_info and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs[argument.name]
                written = [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
                self.before += [(x.copy_, x.clone()) for x in written]
        result = function(*args, **kwargs)
        returned = [out.alias_info for out in function._schema.returns]
        if not any(alias and not alias.is_write for alias in returned):  # a view follows its base
            self.operations.append((function, args, kwargs, result))
        return result

    def replay(self):
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, result in self.operations:
                again = tree_leaves(function(*args, **kwargs))
                for place, new in zip(tree_leaves(result), again, strict=True):
                    if isinstance(place, torch.Tensor) and place is not new:
                        place.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """Lets ``captured`` work on a CPU: each graph is a tape, and there are no streams."""

    class Stream:
        def wait_stream(self, other): ...

    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Tape()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made


@each_method
def test_two_hundred_captured_steps_train_the_policy_that_plain_ones_do(
    module, two_armed, run_of, tapes, monkeypatch
):
    flags = ["--steps", 204, "--hidden-size", 16, "--seeds", 0, 1, "--log-every", 1]
    if "num_pairs" in module.Args.__dataclass_fields__:
        flags += ["--num-pairs", 200]
    if "bc_steps" in module.Args.__dataclass_fields__:
        flags += ["--bc-steps", 20]
    plain = run_of(module, two_armed, *flags)
    assert not tapes
    monkeypatch.setattr(module, "captured", lambda *args: captured(*args[:-1], enabled=True))
    replayed = run_of(module, two_armed, *flags)
    (tape,) = tapes
    assert tape.replays == 204 - EAGER_STEPS > 200
    assert replayed[0] == plain[0]  # the rows of metrics.csv, of single steps
    for name, value in plain[2]["parameters"].items():
        assert torch.equal(replayed[2]["parameters"][name], value), name


def last_of_five(update, generators=()):
    """``update``, captured, five times: what the last returned."""
    optimizer = torch.optim.Adam([torch.zeros(1)])
    step = captured(update, optimizer, list(generators), enabled=True)
    assert optimizer.param_groups[0]["capturable"]
    return [step() for _ in range(EAGER_STEPS + 2)][-1]


def test_a_step_that_a_graph_cannot_hold_is_told_apart(tapes):
    x, draws = torch.zeros(3), torch.Generator()

    def waits():
        return {"loss": x + x.sum().item()}

    def draws_unregistered():
        return {"loss": torch.rand(3, generator=draws)}

    with pytest.raises(AssertionError, match="the host waits"):
        last_of_five(waits)
    with pytest.raises(AssertionError, match="who draws"):
        last_of_five(draws_unregistered)
    assert last_of_five(draws_unregistered, [draws])["loss"].shape == (3,)

    # and one that keeps its state in Python, not in place, stands still
    def counts():
        counts.value = counts.value + 1
        return {"loss": counts.value}

    counts.value = torch.zeros(())
    assert last_of_five(counts)["loss"] == EAGER_STEPS + 1


def test_what_a_captured_step_returned_is_not_overwritten_by_the_next(tapes):
    x = torch.zeros(())
    step = captured(
        lambda: {"loss": x.add_(1)}, torch.optim.Adam([torch.zeros(1)]), [], enabled=True
    )
    values = [step()["loss"] for _ in range(EAGER_STEPS + 3)][EAGER_STEPS:]
    assert values == [EAGER_STEPS + 1, EAGER_STEPS + 2, EAGER_STEPS + 3]


@each_method
def test_without_a_gpu_the_flag_says_so_and_nothing_is_written(module, run_script, tmp_path):
    flags = ("--data", "bundled", "--device", "cpu", "--output-dir", tmp_path, "--cudagraphs")
    code, _, stderr = run_script(module.main, *flags)
    assert code == 2 and "--cudagraphs: needs a CUDA GPU" in stderr
    assert not list(tmp_path.iterdir())


def on_a_gpu(loss, *shapes):
    """Shapes of what ``loss`` returns of one run, mapped over 2 seeds and 3 limits on a GPU."""
    with FakeTensorMode(), torch.no_grad():
        arguments = [torch.empty(2, 3, *shape, device="cuda") for shape in shapes]
        value, metrics = torch.vmap(torch.vmap(loss))(*arguments)
        assert {x.device.type for x in (value, *metrics.values())} == {"cuda"}
        return {x.shape for x in (value, *metrics.values())}


def test_a_gpu_takes_every_loss_mapped_twice():
    each, pair, one, args = (8, 2), (8,), (), presa.Args()
    assert on_a_gpu(
        lambda score, label, weight, known, nu: presa.presa_loss(
            score, (label, weight, known), nu, args
        ),
        *(each, each, each, pair, one),
    ) == {(2, 3)}
    assert on_a_gpu(
        lambda *batch: binary_alignment.alignment_loss(*batch, args.beta), each, each, each
    ) == {(2, 3)}
    assert on_a_gpu(
        lambda *batch: unified_comparison.preference_loss(*batch, args.alpha), each, pair
    ) == {(2, 3)}


@each_method
def test_a_gpu_takes_every_policy_mapped_twice(module):
    policy = module.Policy(7, 2, 16)
    shapes = {name: p.shape for name, p in policy.named_parameters()}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        parameters = {n: torch.empty(2, 3, *x, device="cuda") for n, x in shapes.items()}
        observation, masks = (torch.empty(2, *x, device="cuda") for x in ((5, 7), (2, 5, 16)))

        def act(parameters, observation, masks):
            mean = functional_call(policy, parameters, (observation, masks.unbind(0)))
            return module.log_prob(mean, torch.zeros_like(mean))

        mapped = torch.vmap(torch.vmap(act, in_dims=(0, None, None)))
        assert mapped(parameters, observation, masks).shape == (2, 3, 5)


def test_log_sigmoid_is_torchs():
    x = torch.linspace(-60, 60, 2001)
    assert torch.equal(log_sigmoid(x), F.logsigmoid(x))

    class OnGpu(torch.Tensor):
        is_cuda = True

    # what it is on a GPU, and the reason for it: where this no longer fails, torch's own will do
    torch.testing.assert_close(
        log_sigmoid(x.as_subclass(OnGpu)).as_subclass(torch.Tensor), log_sigmoid(x)
    )
    with FakeTensorMode(), pytest.raises(RuntimeError):
        torch.vmap(torch.vmap(F.logsigmoid))(torch.empty(2, 3, 4, device="cuda"))

"""What a CUDA GPU wants done differently: a step as one graph, and a function it does not take.

Small networks leave a GPU idle between the hundred-odd kernels of a step, each of which Python has
to launch; a graph launches them all at once, and the GPU waits for Python no more.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Update = Callable[[], dict[str, Tensor]]

EAGER_STEPS = 3  # before the capture: libraries and the optimiser set themselves up in them


def log_sigmoid(x: Tensor) -> Tensor:
    """log sigmoid(x), element by element.

    torch's own cannot be mapped twice on a GPU: its CUDA kernel returns an empty buffer beside the
    result, of which each ``vmap`` takes a dimension (torch 2.13).
    """
    return -F.softplus(-x) if x.is_cuda else F.logsigmoid(x)


def captured(
    update: Update,
    optimizer: torch.optim.Optimizer,
    generators: list[torch.Generator],
    enabled: bool,
) -> Update:
    """``update`` itself, or where ``enabled`` what does the same by replaying a CUDA graph of it.

    Args:
        update: one gradient step. All that it reads and changes stays in place, on the GPU; it
            returns what to log, and asks for no value on the host.
        optimizer: the one that it steps; set to what a capture asks of it.
        generators: all that it draws from.
        enabled: the flag ``--cudagraphs``.
    """
    if not enabled:
        return update
    for group in optimizer.param_groups:
        group["capturable"] = True  # it keeps its count of steps on the GPU
    return _Captured(update, generators)


class _Captured:
    def __init__(self, update: Update, generators: list[torch.Generator]):
        self.update, self.calls = update, 0
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:  # else every replay would draw the same numbers
            self.graph.register_generator_state(generator)
        self.metrics: dict[str, Tensor] = {}  # where each replay leaves them

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= EAGER_STEPS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                metrics = self.update()
            torch.cuda.current_stream().wait_stream(self.stream)
            return metrics
        if self.calls == EAGER_STEPS + 1:  # notes the step down, without doing it
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.metrics = self.update()
        self.graph.replay()
        return {name: x.clone() for name, x in self.metrics.items()}

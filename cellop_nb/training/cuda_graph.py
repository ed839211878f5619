"""What makes a step quicker and changes no number: parts compiled by torch, steps recorded as CUDA graphs.

A step on small batches is hundreds of calls that each take the device a microsecond or two and Python ten times as
long. Recorded once as a CUDA graph, it is replayed with the batch's small inputs, the learning rate and the weights of
the loss copied into the places that the recording reads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError

RATE = "learning rate"
_COMPILERS = ("g++", "clang++", "c++")

Made = tuple[dict[str, Tensor], Tensor]
"""Loss terms and gradient norm of a step."""


@dataclass
class _Recording:
    """What a recorded step reads, what it leaves, and how it is made again."""

    inputs: dict[str, Tensor]
    numbers: dict[str, Tensor]
    told: dict[str, float]
    made: Made
    finite: Tensor
    replay: Callable[[], None]


class Recorder:
    """Records the steps of a trainer, one for each shape of its batches, and replays them.

    Parameters
    ----------
    trainer
        Whose :meth:`~cellop_nb.training.loop.Trainer.make_step` is recorded.
    capture
        Gets a function of calls of the device and the generators that it draws from; gives the function's result, and
        what makes the calls again. By default a CUDA graph.

    Attributes
    ----------
    numbers : dict
        While a step is recorded: the weights of the loss, as tensors of the device.
    replayed : int
        Steps that were replayed.
    """

    PLAIN = 3
    """Steps of a shape that are made call by call first: libraries and caches are then ready."""

    MOST = 8
    """Recordings that are kept, each with memory of its own."""

    def __init__(self, trainer, capture: Callable | None = None) -> None:
        self._trainer, self._capture = trainer, capture or _cuda_graph
        self.numbers: dict[str, Tensor] = {}
        self.replayed = 0
        self.forget()

    def forget(self) -> None:
        """Drop all recordings: what they read lies elsewhere now."""
        self._seen: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}

    def step(self, batch) -> Made | None:
        """Make a step by replaying it; None for one that is to be made call by call."""
        trainer = self._trainer
        shape = trainer.shape_of(batch)
        if shape is None:
            return None
        key = shape, trainer.clip_norm, trainer.model.training
        if key not in self._recordings:
            self._seen[key] += 1
            if self._seen[key] <= self.PLAIN or len(self._recordings) >= self.MOST:
                return None
            self._recordings[key] = self._record(batch)
        return self._replay(self._recordings[key], trainer.inputs_of(batch))

    def _record(self, batch) -> _Recording:
        trainer = self._trainer
        device = trainer.fabric.device
        inputs = {name: tensor.clone() for name, tensor in trainer.inputs_of(batch).items()}
        told = self._told()
        numbers = {name: torch.tensor(number, device=device) for name, number in told.items()}
        self.numbers = {name: value for name, value in numbers.items() if name != RATE}
        generators = [
            value
            for value in vars(trainer).values()
            if isinstance(value, torch.Generator) and value.device.type == device.type
        ]
        try:
            with _rate_as_tensor(trainer.optimizer, numbers[RATE]):
                made, replay = self._capture(
                    lambda: trainer.make_step(trainer.with_inputs(batch, inputs)), generators
                )
        except RuntimeError as error:
            fix = "pass cuda_graphs=False, or let loss_terms call the device alone and look at no value"
            raise ModelError("a step that can be recorded as a CUDA graph", str(error), fix) from error
        finally:
            self.numbers = {}
        return _Recording(inputs, numbers, told, made, trainer.guard.finite, replay)

    def _replay(self, recording: _Recording, inputs: dict[str, Tensor]) -> Made:
        for name, value in inputs.items():
            recording.inputs[name].copy_(value, non_blocking=True)
        for name, number in self._told().items():
            if number != recording.told[name]:
                recording.numbers[name].fill_(number)
                recording.told[name] = number
        recording.replay()
        self.replayed += 1
        # The next replay writes to the same places.
        self._trainer.guard.finite = recording.finite.clone()
        terms, norm = recording.made
        return {name: term.clone() for name, term in terms.items()}, norm.clone()

    def _told(self) -> dict[str, float]:
        rate = float(self._trainer.optimizer.param_groups[0]["lr"])
        return {**self._trainer.weights_now(), RATE: rate}


@contextlib.contextmanager
def _rate_as_tensor(optimizer, rate: Tensor) -> Iterator[None]:
    """While a step is recorded the optimiser reads its learning rate from the device."""
    before = [{key: group[key] for key in ("lr", "capturable")} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group |= {"lr": rate, "capturable": True}
    try:
        yield
    finally:
        for group, kept in zip(optimizer.param_groups, before, strict=True):
            group |= kept


def _cuda_graph(run: Callable[[], Any], generators: list[torch.Generator]) -> tuple[Any, Callable[[], None]]:
    """What `run` gives, and the replay of its calls; they have not been made yet."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outcome = run()
    return outcome, graph.replay


def recorder_of(trainer, wanted: bool | None) -> Recorder | None:
    """The recorder of a trainer; None where `wanted` is False, or None and it cannot be.

    Raises
    ------
    ModelError
        Where steps are to be recorded and cannot be: the reason, and what to do.
    """
    obstacles = {
        f"{type(trainer).__name__} without recordable = True": not vars(type(trainer)).get("recordable"),
        f"the device {trainer.fabric.device}": trainer.fabric.device.type != "cuda",
        f"{trainer.processes.size} processes": trainer.processes.size > 1,
        "on_nonfinite='rollback', whose next step depends on the last": not trainer.guard.holds_back,
    }
    obstacle = next((reason for reason, holds in obstacles.items() if holds), "")
    if wanted and obstacle:
        fix = "leave cuda_graphs out, or make it so"
        raise ModelError("steps that can be recorded, for cuda_graphs=True", obstacle, fix)
    return None if wanted is False or obstacle else Recorder(trainer)


def check_compiler(device: torch.device) -> None:
    """Refuse where ``torch.compile`` would find no compiler for the device, before any step is made.

    Raises
    ------
    ModelError
        Without a C++ compiler for a CPU, or Triton for a GPU.
    """
    if device.type == "cpu":
        compilers = (os.environ["CXX"],) if os.environ.get("CXX") else _COMPILERS
        if not any(map(shutil.which, compilers)):
            fix = "install g++ or clang++ (conda install cxx-compiler), or leave compile=True out"
            raise ModelError("a C++ compiler for compile=True", f"none of {list(compilers)}", fix)
    elif importlib.util.find_spec("triton") is None:
        fix = "install triton, or leave compile=True out"
        raise ModelError("Triton for compile=True on a GPU", "no such package", fix)


@contextlib.contextmanager
def compiled(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the context, methods of the model (dotted names) run compiled.

    With ``fullgraph``: what cannot be compiled as a whole is an error, and never falls back to plain steps in silence.
    """
    owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    for owner, method in owners:
        setattr(owner, method, torch.compile(getattr(owner, method), fullgraph=True))
    try:
        yield
    finally:
        for owner, method in owners:
            delattr(owner, method)  # the class's own method is seen again

"""What a trainer trains: its data and its mathematics, which a subclass gives to the loop."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor


class Task:
    """The part of a trainer that is not the loop: batches, loss terms and validation.

    The loss is the sum of the named terms.

    Attributes
    ----------
    monitor : str
        Column of the history whose smallest value marks the best epoch.
    unit : str
        What the progress bar says is trained.
    compilable : tuple of str
        Methods of the model, by their dotted names, that ``compile=True`` compiles.
    recordable : bool
        Whether a step may be recorded once and replayed (a CUDA graph): `loss_terms` then calls the device alone, looks
        at no value, and reads what changes between steps from the batch's `inputs_of` and from :attr:`in_force`. A
        subclass says so itself: what it adds would else be frozen unseen.
    in_force : dict
        Weights of the loss terms in this step; tensors of the device while it is recorded.
    """

    monitor = "val_loss"
    unit = "training"
    compilable: tuple[str, ...] = ()
    recordable = False
    weights: dict[str, float]
    recorder: Any = None

    @property
    def in_force(self) -> dict[str, Any]:  # noqa: D102 (told above)
        recorded = self.recorder and self.recorder.numbers
        return recorded or self.weights_now()

    def weights_now(self) -> dict[str, float]:
        """Weights of the loss terms in this step, by name; those that may be changed by hand as they are."""
        return dict(self.weights)

    def shape_of(self, batch) -> Hashable | None:
        """What batches of one recording have in common; None for one that is made step by step."""
        return None

    def inputs_of(self, batch) -> dict[str, Tensor]:
        """The tensors in which batches of one shape differ."""
        raise NotImplementedError

    def with_inputs(self, batch, inputs: dict[str, Tensor]):
        """The batch that these inputs make, of the shape of `batch`, by calls of the device alone."""
        raise NotImplementedError

    def batches(self) -> Iterable:
        """Training batches of one epoch."""
        raise NotImplementedError

    def loss_terms(self, batch) -> dict[str, Tensor]:
        """Named, weighted loss terms of one batch (0-d tensors); the loss is their sum."""
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Columns of the history from held-out cells; contains the monitored one."""
        raise NotImplementedError

    def describe_batch(self, batch) -> dict[str, list[str]]:
        """Names of the cells, genes or groups of a batch, for messages."""
        return {}

    def batch_size_of(self, batch) -> int:
        """Number of cells in a batch."""
        raise NotImplementedError

    def steps_per_epoch(self) -> int:
        """Number of batches of one epoch."""
        raise NotImplementedError

    def before_epoch(self) -> None:
        """Set what changes by epoch (warm-ups)."""

"""What a trainer trains: its data and its mathematics, which a subclass gives to the loop."""

from __future__ import annotations

from collections.abc import Iterable

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
    """

    monitor = "val_loss"
    unit = "training"
    compilable: tuple[str, ...] = ()

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

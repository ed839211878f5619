"""What a trainer says of itself in a notebook: how far it is, its best epoch, what was changed by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..views import card

if TYPE_CHECKING:
    from .loop import Trainer


def trainer_card(trainer: Trainer) -> str:
    """HTML of a trainer's state."""
    last = trainer.rows[-1] if trainer.rows else {}
    terms = [f"{name} {last[name]:.4g}" for name in last if name.startswith(("train_", "val_loss"))]
    best = f"{trainer.best_value:.4g} in epoch {trainer.best_epoch + 1}" if trainer.rows else None
    facts = {
        "status": f"{trainer.status} {trainer.stop_reason}".strip(),
        "epochs": f"{trainer.epoch} of {trainer.max_epochs} ({trainer.step:,} steps)",
        f"best {trainer.monitor}": best,
        "last epoch": terms or None,
        "learning rate": trainer.learning_rate,
        "weights": [f"{name} {value:g}" for name, value in trainer.weights.items()] or None,
        "changed by hand": trainer._words_of_changes(trainer.changes) or None,
        "folder": None if trainer.folder is None else str(trainer.folder),
        "seed": trainer.seed,
    }
    title = f"{type(trainer).__name__} for {type(trainer.model).__name__}"
    return card(title, facts, note="history: trainer.history")

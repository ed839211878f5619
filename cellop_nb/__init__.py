"""Learn what a perturbation does: affine operators in the latent space of single-cell counts.

Names are loaded on first use, so that importing the package takes milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public name -> module that defines it (an empty name after the colon: the module itself)
_PUBLIC = {
    "datasets": "data.datasets",
    "errors": "errors",
    "pl": "notebook.pl",
    "callbacks": "training.callbacks",
    "combinations": "analysis.combinations",
    "diagnose": "analysis.diagnose",
    "distances": "analysis.distances",
    "exchange": "analysis.exchange",
    "features": "analysis.features",
    "genes": "analysis.genes",
    "metrics": "analysis.metrics",
    "uncertainty": "analysis.uncertainty",
    "virtual": "notebook.virtual",
    "results": "notebook.results",
    "report": "notebook.report",
    "setup": "data.contract",
    "split": "data.splits",
    "select_genes": "data.genes",
    "Groups": "data.groups",
    "nb_log_likelihood": "models.likelihood",
    "energy_distance": "models.energy",
    "NBVAE": "models.vae",
    "OperatorModel": "models.operators",
    "VAETrainer": "training.vae",
    "new_vae": "training.vae",
    "OperatorTrainer": "training.operators",
    "new_operators": "training.operators",
    "Machine": "training.loop",
    "Penalties": "training.operators",
    "load": "analysis.cellop",
    "CellOp": "analysis.cellop",
    "embed": "analysis.predict",
    "score": "analysis.scores",
    "holdout": "analysis.holdout",
    "next_experiments": "analysis.uncertainty",
    "LivePlot": "notebook.live",
    "Explorer": "notebook.explorer",
    "TuningPanel": "notebook.tuning",
    "RunControls": "notebook.controls",
}
_MODULES = {
    "callbacks",
    "combinations",
    "datasets",
    "diagnose",
    "distances",
    "errors",
    "exchange",
    "features",
    "genes",
    "metrics",
    "pl",
    "results",
    "uncertainty",
    "virtual",
}

if TYPE_CHECKING:  # the names below are found by `__getattr__` while running
    from . import errors as errors
    from .analysis import combinations as combinations
    from .analysis import diagnose as diagnose
    from .analysis import distances as distances
    from .analysis import exchange as exchange
    from .analysis import features as features
    from .analysis import genes as genes
    from .analysis import metrics as metrics
    from .analysis import uncertainty as uncertainty
    from .analysis.cellop import CellOp as CellOp
    from .analysis.cellop import load as load
    from .analysis.holdout import holdout as holdout
    from .analysis.predict import embed as embed
    from .analysis.scores import score as score
    from .analysis.uncertainty import next_experiments as next_experiments
    from .data import datasets as datasets  # noqa: F401
    from .data.contract import setup as setup
    from .data.genes import select_genes as select_genes
    from .data.groups import Groups as Groups
    from .data.splits import split as split
    from .models.energy import energy_distance as energy_distance
    from .models.likelihood import nb_log_likelihood as nb_log_likelihood
    from .models.operators import OperatorModel as OperatorModel
    from .models.vae import NBVAE as NBVAE
    from .notebook import pl as pl
    from .notebook import results as results
    from .notebook import virtual as virtual
    from .notebook.controls import RunControls as RunControls
    from .notebook.explorer import Explorer as Explorer
    from .notebook.live import LivePlot as LivePlot
    from .notebook.report import report as report
    from .notebook.tuning import TuningPanel as TuningPanel
    from .training import callbacks as callbacks
    from .training.loop import Machine as Machine
    from .training.operators import OperatorTrainer as OperatorTrainer
    from .training.operators import Penalties as Penalties
    from .training.operators import new_operators as new_operators
    from .training.vae import VAETrainer as VAETrainer
    from .training.vae import new_vae as new_vae

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .packages import refuse_outdated_once

    refuse_outdated_once()
    module = import_module(f"{__name__}.{_PUBLIC[name]}")
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

"""Learn what a perturbation does: affine operators in the latent space of single-cell counts.

Names are loaded on first use, so that importing the package takes milliseconds.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

# public name -> module that defines it (an empty name after the colon: the module itself)
_PUBLIC = {
    "datasets": "data.catalogue",
    "check": "data.contract",
    "context_labels": "data.contract",
    "split": "data.splits",
    "groups": "data.batches",
    "nb_log_likelihood": "models.likelihood",
    "NegativeBinomial": "models.likelihood",
    "energy_distance": "models.energy",
    "NBVAE": "models.vae",
    "Encoder": "models.vae",
    "DecoderNB": "models.vae",
    "sample_z": "models.vae",
    "elbo_loss": "models.vae",
    "Condition": "models.conditions",
    "OperatorModel": "models.operators",
    "VAETrainer": "training.vae",
    "new_vae": "training.vae",
    "OperatorTrainer": "training.operators",
    "new_operators": "training.operators",
    "Callback": "training.callbacks",
    "EarlyStopping": "training.callbacks",
    "NonFiniteError": "training.guard",
    "save": "training.checkpoint",
    "load": "training.checkpoint",
    "embed": "analysis.predict",
    "predict": "analysis.predict",
    "evaluate": "analysis.metrics",
    "holdout": "analysis.holdout",
    "etest": "analysis.etest",
    "gradient_audit": "analysis.diagnose",
    "LivePlot": "notebook.live",
}
_MODULES = {"datasets"}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_PUBLIC[name]}")
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

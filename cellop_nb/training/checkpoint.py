"""Models on disk: weights as safetensors, how to build the models as JSON; no code is ever run on reading."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import CheckpointError, three_beats
from ..models.operators import OperatorModel
from ..models.vae import NBVAE

FORMAT = 1
_DESCRIPTION = "models.json"


@dataclass(frozen=True)
class Stored:
    """What :func:`load` found: models that were not saved are None."""

    vae: NBVAE | None = None
    operators: OperatorModel | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def save(
    path: str | Path,
    *,
    vae: NBVAE | None = None,
    operators: OperatorModel | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write models into a folder.

    Parameters
    ----------
    path
        Folder; made when it is not there. Each file is replaced as a whole.
    vae, operators
        The models to write.
    extra
        Anything that JSON can hold, given back by :func:`load`.

    Returns
    -------
    The folder.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    models = {"vae": vae, "operators": operators}
    kept = {name: model for name, model in models.items() if model is not None}
    for name, model in kept.items():
        weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        _replace(path / f"{name}.safetensors", lambda file, w=weights: save_file(w, file))
    description = {
        "format": FORMAT,
        "models": {name: model.config for name, model in kept.items()},
        "extra": extra or {},
    }
    text = json.dumps(description, indent=1)
    _replace(path / _DESCRIPTION, lambda file: Path(file).write_text(text, encoding="utf-8"))
    return path


def load(path: str | Path) -> Stored:
    """Read the models of a folder written by :func:`save`, in evaluation mode.

    Raises
    ------
    CheckpointError
        Where the folder, or a file in it, is missing, damaged or of a later format.
    """
    path = Path(path)
    try:
        description = json.loads((path / _DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "name the folder that save() wrote"
        raise CheckpointError(three_beats(f"models in {path}", str(error), fix)) from error
    if description.get("format") != FORMAT:
        found = f"format {description.get('format')!r}"
        raise CheckpointError(three_beats(f"models of format {FORMAT}", found, "save them again"))
    builders = {"vae": _vae, "operators": _operators}
    described = description["models"].items()
    models = {name: _read(path, name, builders[name], config) for name, config in described}
    return Stored(**models, extra=description["extra"])


def _read(path: Path, name: str, build, config: dict) -> nn.Module:
    try:
        weights = load_file(path / f"{name}.safetensors")
        model = build(config, weights)
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:
        fix = "save the model again with this version"
        raise CheckpointError(three_beats(f"a readable {name} in {path}", str(error), fix)) from error
    return model.eval()


def _vae(config: dict, weights: dict) -> NBVAE:
    return NBVAE(**config)


def _operators(config: dict, weights: dict) -> OperatorModel:
    # given features of perturbations are a buffer, whose size the model must know when it is built
    pairs = [tuple(pair) for pair in config["pairs"]]
    return OperatorModel(**{**config, "pairs": pairs}, features=weights.get("conditions.features"))


def _replace(path: Path, write) -> None:
    """Write beside `path`, then rename: a reader never sees half a file."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

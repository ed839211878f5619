"""Files of a training: the state of a run, and the finished models; neither stores nor runs code.

A run's state holds all that its next epoch depends on. Models are tensors (safetensors) and a JSON description.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..files import write_whole
from ..models.operators import OperatorModel
from ..models.vae import NBVAE
from .locate import is_finite

SCHEMA = 2
"""Version of the file's layout; a file with a higher one is refused, one with a lower is read."""

_ENTRY = "cellop_nb"
_DIGEST = "sha256"  # of the description and the tensors; files of earlier versions have none
_SEAL = b"\ncellop_nb sha256 "
_PACKAGES = ("cellop_nb", "torch", "anndata", "numpy", "safetensors")
_ARRAYS = "predictor"  # where the arrays beside the models stand


@dataclass(frozen=True)
class Saved:
    """What :func:`read_models` gives back.

    Attributes
    ----------
    vae, operators
        The models in evaluation mode; None where none was saved.
    keys
        Keywords that the data were read with (``layer``, ``perturbation_key`` ...).
    trained
        Per model how it was trained: settings, epochs, best epoch, changes by hand, why it ended.
    members
        Pairs (VAE, operators) of further seeds.
    arrays, predictor
        What a fitted :class:`CellOp` knows beside its models: group means and what is said of them; empty where only
        models were saved.
    """

    vae: NBVAE | None
    operators: OperatorModel | None
    keys: dict
    trained: dict
    members: list = field(default_factory=list)
    arrays: dict = field(default_factory=dict, repr=False)
    predictor: dict = field(default_factory=dict, repr=False)


def model_file(path: str | Path) -> Path:
    """The path of a model's file: with ``.safetensors`` where it does not end so; refuses what is no path."""
    if not isinstance(path, str | os.PathLike) or not Path(path).name:
        raise CheckpointError(
            "the path of a model's file", repr(path), "name one, such as 'model.safetensors'"
        )
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def write_models(
    path: str | Path,
    vae: NBVAE | None = None,
    operators: OperatorModel | None = None,
    *,
    keys: Mapping | None = None,
    members: Sequence[tuple[NBVAE, OperatorModel]] = (),
    arrays: Mapping[str, np.ndarray] | None = None,
    predictor: Mapping | None = None,
) -> Path:
    """Write trained models to one file, whole or not at all; returns its path.

    Parameters
    ----------
    path
        File to write (``.safetensors``); an earlier one is replaced at the last moment.
    vae, operators
        At least one of them. Gene names, covariate categories, perturbations and contexts go with them.
    keys
        Keywords of the data: JSON values.
    members, arrays, predictor
        As in :class:`Saved`.

    Raises
    ------
    CheckpointError
        If there is nothing to save, a weight is not finite, or `keys` or `predictor` hold what JSON cannot.
    """
    models = {
        name: model for name, model in {"vae": vae, "operators": operators}.items() if model is not None
    }
    if not models:
        fix = "pass vae=..., operators=... or both"
        raise CheckpointError("a model to save", "neither a VAE nor operators", fix)
    for k, pair in enumerate(members, 1):
        models |= {f"vae_{k}": pair[0], f"operators_{k}": pair[1]}
    about = {
        "schema": SCHEMA,
        "versions": {name: _version(name) for name in _PACKAGES},
        "config": {name: model.config for name, model in models.items()},
        "form": type(operators).__name__,
        "trained": {name: getattr(model, "trained", {}) for name, model in models.items()},
        "keys": dict(keys or {}),
        "predictor": dict(predictor or {}),
    }
    states = [(f"{name}.{key}", t) for name, model in models.items() for key, t in model.state_dict().items()]
    whole = torch.contiguous_format  # also of one element, whose strides may be anything
    tensors = {name: tensor.detach().cpu().clone(memory_format=whole) for name, tensor in states}
    tensors |= {
        f"{_ARRAYS}.{key}": torch.tensor(np.array(value, order="C")) for key, value in (arrays or {}).items()
    }
    try:
        metadata = {_ENTRY: json.dumps(about, allow_nan=True, default=_plain_number)}
    except TypeError as error:
        expected, fix = (
            "text, numbers, lists and dictionaries",
            "convert them with float(), str() or .to_dict()",
        )
        raise CheckpointError(expected, str(error), fix) from error
    _refuse_broken(tensors, path)
    metadata[_DIGEST] = _digest_of(metadata[_ENTRY], tensors)
    return write_whole(path, lambda part: save_file(tensors, part, metadata))


def _plain_number(value: object) -> object:
    """A number of numpy, as sizes may be, in the types of JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__}, {value!r:.60}")


def read_models(path: str | Path, *, form: type[OperatorModel] = OperatorModel) -> Saved:
    """Read models written by :func:`write_models`.

    Parameters
    ----------
    path
        The file.
    form
        The subclass of :class:`OperatorModel` that was saved, where it was one: a file holds no code.

    Returns
    -------
    Saved
        The models in evaluation mode, on the CPU, with what was saved beside them.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, of another kind, or of a later version.
    """
    path = Path(path)
    about, tensors = _read(path)
    if about["schema"] > SCHEMA:
        writer = f"schema {about['schema']}, written by cellop_nb {about['versions'].get('cellop_nb')}"
        raise CheckpointError(
            f"schema {SCHEMA} or lower in {path}", writer, "install that version of cellop_nb"
        )
    saved = about.get("form", OperatorModel.__name__)
    if "operators" in about["config"] and saved != form.__name__:
        fix = f"pass form={saved}, the class that the operators were made with"
        raise CheckpointError(f"operators of the form {form.__name__} in {path}", saved, fix)
    _refuse_broken(tensors, path)
    makers = {name: form if name.startswith("operators") else NBVAE for name in about["config"]}
    models = {name: _rebuild(name, maker, about, tensors, path) for name, maker in makers.items()}
    others = [(models[name], models[f"operators{name[3:]}"]) for name in models if name.startswith("vae_")]
    arrays = {name: tensor.numpy() for name, tensor in _part(tensors, _ARRAYS).items()}
    keys, trained, predictor = (about.get(name, {}) for name in ("keys", "trained", "predictor"))
    return Saved(models.get("vae"), models.get("operators"), keys, trained, others, arrays, predictor)


def _refuse_broken(tensors: dict[str, Tensor], path: str | Path) -> None:
    """A file of NaN is neither written nor read."""
    broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        expected, fix = f"finite weights in {path}", "save the models of a training that stayed finite"
        raise CheckpointError(expected, f"NaN or infinity in {broken[:3]}", fix)


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors whose names start with `name`, by the rest of their names."""
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    expected = f"a file written by CellOp.save at {path}"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
            about = json.loads(metadata[_ENTRY])
        if metadata.get(_DIGEST, "") not in ("", _digest_of(metadata[_ENTRY], tensors)):
            raise ValueError("its digest is that of other content")
        if not (
            isinstance(about, dict)
            and isinstance(about.get("schema"), int)
            and all(isinstance(about.get(name, {}), dict) for name in ("config", "versions", "trained"))
            and all(isinstance(config, dict) for config in about.get("config", [None]).values())
        ):
            raise ValueError("a description of something else")
    except KeyError:
        fix = "give the path that was saved to"
        raise CheckpointError(expected, "tensors of another program", fix) from None
    except (OSError, SafetensorError, ValueError, AttributeError, RecursionError) as error:
        problem = "no such file" if not path.is_file() else f"a damaged or foreign file ({error})"
        raise CheckpointError(expected, problem, "save the models again, or check the path") from error
    return about, tensors


def _digest_of(description: str, tensors: dict[str, Tensor]) -> str:
    content = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        content.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        content.update(tensors[name].reshape(-1).contiguous().view(torch.uint8).numpy())
    return content.hexdigest()


def _refuse_oversized(maker: Callable, config: dict, path: Path) -> None:
    """Refuse sizes that no file of this length can hold the tensors of, before anything of that size is made."""
    length = path.stat().st_size
    expected, fix = f"sizes that fit a file of {length:,} bytes", "save the models again; the file is damaged"
    largest = max(_whole_numbers(config), default=0)
    if largest > length:
        raise CheckpointError(expected, f"{largest:,} in {path}", fix)
    with torch.device("meta"):
        elements = sum(tensor.numel() for tensor in maker(**config).state_dict().values())
    if elements > length:
        raise CheckpointError(expected, f"{elements:,} numbers in {path}", fix)


def _whole_numbers(value: object) -> Iterator[int]:
    if isinstance(value, int):
        yield abs(value)
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(item)


def _rebuild(name: str, maker: type, about: dict, tensors: dict[str, Tensor], path: Path):
    state = _part(tensors, name)
    try:
        config = about["config"][name]
        _refuse_oversized(maker, config, path)
        model = maker(**config)
        # Saved in double precision, loaded in double precision.
        model.to(next(iter(state.values())).dtype)
        model.load_state_dict(_from_schema_1(state, model) if about["schema"] < 2 else state)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged description makes the model's maker say
        fix = "save the models again with this version"
        raise CheckpointError(
            f"the tensors of the {name} in {path}", f"{type(error).__name__}: {error}", fix
        ) from error
    model.trained = about.get("trained", {}).get(name, {})
    return model.eval()


def _from_schema_1(state: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """Layout 2 stores the encoder's first layer by genes, covariates apart, and has a linear path beside it.

    At zero that path is not there: the model computes what the saved one did.
    """
    first, path = "encoder.body.0.weight", "encoder.linear.weight"
    if first not in state:  # operators
        return state
    linear = model.get_parameter(path)
    genes, covariates = state[first].t().split([len(linear), state[first].shape[1] - len(linear)])
    state = state | {first: genes.contiguous(), path: torch.zeros_like(linear)}
    return state | {"encoder.body.0.covariates": covariates.contiguous()} if covariates.numel() else state


def write_state(path: str | Path, state: dict) -> Path:
    """Write the state of a run, whole or not at all; readable with ``weights_only=True``.

    The file ends with a digest of all that is before, so that no damage goes unseen.
    """
    content = io.BytesIO()  # torch's own writer of files does not say why it failed
    torch.save(state, content)
    whole = content.getvalue() + _SEAL + hashlib.sha256(content.getbuffer()).hexdigest().encode()
    return write_whole(path, lambda part: part.write_bytes(whole))


def read_state(path: str | Path, device: torch.device | str, expected: str) -> dict:
    """Read what :func:`write_state` wrote; no code in it is ever run.

    Raises
    ------
    CheckpointError
        If the file is missing or damaged; `expected` says what it should have been.
    """
    try:
        content, seal, digest_there = Path(path).read_bytes().rpartition(_SEAL)
        if not seal:
            raise ValueError("it does not end with the digest that a checkpoint ends with")
        if digest_there != hashlib.sha256(content).hexdigest().encode():
            raise ValueError("its digest is that of other content")
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:
        fix = "give the path that was written, or start the run anew"
        raise CheckpointError(expected, f"{path}, {reason(error)}", fix) from error


def reason(error: Exception) -> str:
    """In one line why a checkpoint cannot be used; torch's own text advises to run the code that a file holds."""
    if isinstance(error, FileNotFoundError):
        return "which does not exist"
    if isinstance(error, pickle.UnpicklingError):
        return "which holds more than tensors, numbers and text, and is never run"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"which does not fit: {lines[min(1, len(lines) - 1)]}" if lines else type(error).__name__


def digest(values) -> str:
    """Short fingerprint of a tensor or array."""
    data = torch.as_tensor(values).detach().cpu().contiguous()
    return hashlib.sha256(data.numpy()).hexdigest()[:16]  # read where it lies


def plain(value):
    """The value without numpy scalars, which a checkpoint must not hold."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _equal(old, new) -> bool:
    if isinstance(old, torch.Tensor):
        return isinstance(new, torch.Tensor) and torch.equal(old.cpu(), new.cpu())
    return not isinstance(new, torch.Tensor) and old == new


def refuse_other_run(then: dict, now: dict, path: str = "") -> None:
    """Name the first entry in which a run and its checkpoint differ; later versions may know more entries."""
    for name in then:
        old, new, here = then.get(name), now.get(name), f"{path}{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            refuse_other_run(old, new, f"{here}.")
        elif not _equal(old, new):
            fix = "build model and trainer as for that run, or start anew in another folder"
            problem = f"{here} {_short(new)}, not {_short(old)}"
            raise CheckpointError("the run that the checkpoint is of", problem, fix)


def _short(value: object) -> str:
    text = f"of {len(value)} entries" if isinstance(value, (list, torch.Tensor)) else repr(value)
    return text if len(text) < 60 else text[:57] + "..."

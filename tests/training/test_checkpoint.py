"""Saved models: the same after loading, whole or not at all, and refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy import small_vae

from cellop_nb.errors import CheckpointError
from cellop_nb.models.operators import Condition, OperatorModel
from cellop_nb.models.vae import NBVAE
from cellop_nb.training import checkpoint
from cellop_nb.training.checkpoint import read_models, write_models

GENES = ["ISG15", "MX1", "IFI6"]


def random_(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


@pytest.fixture
def vae():
    return random_(NBVAE(GENES, n_latent=2, n_hidden=4, covariates={"batch": ["b1", "b2"]}))


@pytest.fixture
def operators():
    return random_(OperatorModel(2, ["A", "B"], ["x"], context_rank=1, rank=0, pairs=[("A", "B")]))


@pytest.fixture
def path(tmp_path, vae, operators):
    return write_models(tmp_path / "run" / "model.safetensors", vae, operators)


def rewrite(path, **changes):
    """Change the description inside a file."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["cellop_nb"]) | changes
    save_file(load_file(path), path, {"cellop_nb": json.dumps(about)})


def edit(path, **tensors):
    """Change tensors inside a file, as one of an earlier version, without a digest."""
    with safe_open(path, framework="pt") as file:
        description = file.metadata()["cellop_nb"]
    save_file(load_file(path) | tensors, path, {"cellop_nb": description})


def test_models_come_back_bit_by_bit(path, vae, operators):
    saved = read_models(path)
    for before, after in ((vae, saved.vae), (operators, saved.operators)):
        assert after.config == before.config
        assert not after.training
        assert all(
            torch.equal(after.state_dict()[name], value) for name, value in before.state_dict().items()
        )
    condition = Condition(("A", "B"), "x")
    assert torch.equal(saved.operators.operator(condition).shift, operators.operator(condition).shift)


@pytest.mark.parametrize(
    "settings",
    [
        {"context_rank": None},
        {"n_axes": 5},
        {"rank": 1, "pairs": [("B", "A")]},
    ],
    ids=str,
)
def test_every_form_of_operators_is_rebuilt(tmp_path, settings):
    model = random_(OperatorModel(2, ["A", "B"], ["x"], **settings))
    again = read_models(write_models(tmp_path / "model", operators=model)).operators
    assert torch.equal(
        again.operator(Condition(("A",), "x")).matrix, model.operator(Condition(("A",), "x")).matrix
    )
    assert again.context_shift.requires_grad == model.context_shift.requires_grad


def test_one_model_alone(tmp_path, vae, operators):
    assert read_models(write_models(tmp_path / "a", vae)).operators is None
    assert read_models(write_models(tmp_path / "b", operators=operators)).vae is None


def test_double_precision_survives(tmp_path, vae):
    vae = vae.double()
    vae.decoder.log_dispersion.data += 1e-12
    again = read_models(write_models(tmp_path / "a", vae)).vae
    assert torch.equal(again.decoder.log_dispersion, vae.decoder.log_dispersion)


SAVED = Path(__file__).with_name("saved")


@pytest.mark.parametrize("name", sorted(path.stem for path in SAVED.glob("*.safetensors")))
def test_files_of_every_earlier_layout_give_the_numbers_they_gave(name):
    """Written by the versions of their time, never again; the numbers beside them are what those computed."""
    saved, told = read_models(SAVED / f"{name}.safetensors"), json.loads((SAVED / f"{name}.json").read_text())
    x, codes = torch.tensor(told["counts"]), {"batch": torch.tensor(told["batch"])}
    condition = Condition(("IFNb", "IL6"), "B")
    with torch.no_grad():
        posterior = saved.vae.encode(x, x.sum(1), codes)
        found = {
            "latent": posterior.loc,
            "scale": posterior.scale,
            "mean": saved.vae.decode(posterior.loc, x.sum(1), codes).mean,
            "matrix": saved.operators.operator(condition).matrix,
            "shift": saved.operators.operator(condition).shift,
        }
    for key, value in found.items():
        torch.testing.assert_close(value, torch.tensor(told[key]), rtol=1e-5, atol=1e-6, msg=key)
    assert saved.keys["control"] == "control"


def test_a_file_of_every_layout_is_kept():
    assert {f"schema{n}" for n in range(1, checkpoint.SCHEMA + 1)} == {
        path.stem for path in SAVED.glob("*.json")
    }


def test_how_a_model_was_trained_travels_along(tmp_path):
    trainer = small_vae(None, max_epochs=2, seed=5)
    trainer.fit()
    saved = read_models(write_models(tmp_path / "a", trainer.model))
    told = saved.trained["vae"]
    assert told == saved.vae.trained == trainer.summary()
    assert told["parameters"]["seed"] == 5 and told["epochs"] == 2 and told["trainer"] == "VAETrainer"
    assert told["val_loss"] == trainer.best_value
    assert read_models(write_models(tmp_path / "b", saved.vae)).trained == saved.trained, (
        "saved again, still known"
    )


def test_keys_travel_along(tmp_path, vae):
    keys = {"layer": None, "context_key": ["cell_type", "donor"]}
    assert read_models(write_models(tmp_path / "a", vae, keys=keys)).keys == keys


def test_nothing_to_save_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a model to save.*pass vae"):
        write_models(tmp_path / "a")


def test_what_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path, vae):
    with pytest.raises(CheckpointError, match="lists and dictionaries.*Tensor.*float"):
        write_models(tmp_path / "a", vae, predictor={"loss": torch.ones(1)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="written by CellOp.save.*a damaged or foreign file.*To fix it"):
        read_models(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(CheckpointError, match="no such file"):
            read_models(path)


def test_tensors_of_another_program_are_refused(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="tensors of another program"):
        read_models(tmp_path / "other")


def test_a_later_schema_is_refused(path):
    rewrite(path, schema=checkpoint.SCHEMA + 1, versions={"cellop_nb": "9.9"})
    with pytest.raises(CheckpointError, match="schema 2 or lower.*schema 3.*9.9.*install that version"):
        read_models(path)


def test_tensors_that_do_not_fit_their_description_are_refused(path, vae):
    rewrite(path, config={"vae": vae.config | {"n_latent": 7}})
    with pytest.raises(CheckpointError, match="(?s)the tensors of the vae.*size mismatch"):
        read_models(path)
    rewrite(path, config={"flux": {}})
    with pytest.raises(CheckpointError, match="the tensors of the flux"):
        read_models(path)


def test_a_failed_save_leaves_the_earlier_file(path, vae, monkeypatch):
    before = path.read_bytes()

    def half(tensors, where, metadata):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        write_models(path, vae)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_reader_of_the_earlier_file_is_not_disturbed(path, operators):
    before = path.read_bytes()
    with path.open("rb") as reader:
        write_models(path, operators=operators)
        assert reader.read() == before
    assert read_models(path).vae is None


def test_no_pickle_is_inside(path):
    assert b"\x80\x02" not in path.read_bytes()[:8]
    assert set(load_file(path)) > {"vae.decoder.log_dispersion", "operators.center"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(path, value):
    weight = load_file(path)["vae.encoder.mean.weight"]
    weight[0, 0] = value
    edit(path, **{"vae.encoder.mean.weight": weight})
    with pytest.raises(CheckpointError, match="finite weights.*encoder.mean.weight.*To fix it"):
        read_models(path)


def test_weights_that_are_not_finite_are_not_written(path, vae):
    vae.encoder.mean.weight.data[0, 0] = np.nan
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="finite weights.*encoder.mean.weight.*stayed finite"):
        write_models(path, vae)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "sizes", [{"n_hidden": 10**6}, {"n_layers": 10**9}, {"n_latent": 10**12}, {"n_hidden": 3000}]
)
def test_sizes_are_checked_against_the_file_before_anything_of_that_size_is_made(
    path, vae, sizes, monkeypatch
):
    rewrite(path, config={"vae": vae.config | sizes})
    elements = []
    plain = torch.nn.Module.register_parameter

    def watched(module, name, value):
        elements.append(0 if value is None or value.device.type == "meta" else value.numel())
        plain(module, name, value)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", watched)
    with pytest.raises(CheckpointError, match="sizes that fit a file of .* bytes.*To fix it"):
        read_models(path)
    assert sum(elements) < 10_000


@pytest.mark.parametrize(
    "text", ["[]", "{}", "3", '{"schema": 2}', '{"schema": "2", "config": {}}', '{"schema": 2, "config": []}',
             '{"schema": 2, "config": {"vae": []}}', '{"schema": 2, "config": {"vae": {"genes": 7}}}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_description_is_refused_in_three_beats(path, text):
    save_file(load_file(path), path, {"cellop_nb": text})
    with pytest.raises(CheckpointError, match="(?s)Expected .*Found .*To fix it"):
        read_models(path)


def test_arrays_of_any_strides_are_saved(vae, tmp_path):
    """One context and one perturbation leave arrays of one element, which stride anyhow."""
    arrays = {"one": np.broadcast_to(np.float32(2.0), (1, 1)), "turned": np.arange(6.0).reshape(2, 3).T}
    vae.decoder.linear.bias.data = torch.as_strided(vae.decoder.linear.bias.data, (3,), (0,))
    saved = read_models(write_models(tmp_path / "model.safetensors", vae, arrays=arrays))
    assert torch.equal(saved.vae.decoder.linear.bias, vae.decoder.linear.bias)
    assert all(np.array_equal(saved.arrays[name], value) for name, value in arrays.items())

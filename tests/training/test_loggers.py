"""The history in TensorBoard, MLflow and Weights & Biases, read back from what they wrote without a network."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from toy import LineTrainer

from cellop_nb.errors import MissingExtraError
from cellop_nb.training.callbacks import MLflow, TensorBoard, WeightsAndBiases

SCRIPT = [3.0, 2.0]


def needs(module: str):
    """Skip where a logger is not installed: it is an extra, and the two README commands do without."""
    return pytest.mark.skipif(
        find_spec(module) is None, reason=f"{module} is not installed: cellop_nb[logging]"
    )


def trained(callback) -> list[dict]:
    trainer = LineTrainer(scripted=SCRIPT, max_epochs=2, callbacks=[callback])
    trainer.fit()
    return trainer.rows


@pytest.mark.parametrize("module, make", [
    ("tensorboard", lambda: TensorBoard("x")), ("mlflow", MLflow), ("wandb", WeightsAndBiases),
])  # fmt: skip
def test_one_that_is_absent_is_named_with_its_extra(monkeypatch, module, make):
    monkeypatch.setattr("cellop_nb.packages.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"{module}.*cellop_nb\[logging\]"):
        make()


@needs("tensorboard")
def test_tensorboard_has_every_column_by_epoch(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = trained(TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert "val_loss" in events.Tags()["scalars"]
    assert [(e.step, e.value) for e in events.Scalars("val_loss")] == [
        (r["epoch"], r["val_loss"]) for r in rows
    ]


@needs("mlflow")
def test_mlflow_has_every_column_in_a_run_that_is_ended(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    place = (tmp_path / "mlruns").as_uri()
    mlflow.set_tracking_uri(place)
    rows = trained(MLflow("a fit"))
    assert mlflow.active_run() is None
    client = mlflow.MlflowClient(place)
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED" and run.info.run_name == "a fit"
    kept = client.get_metric_history(run.info.run_id, "val_loss")
    assert [(m.step, m.value) for m in kept] == [(r["epoch"], r["val_loss"]) for r in rows]
    with mlflow.start_run():
        trained(MLflow())
        assert mlflow.active_run() is not None, "a run of the user's own is left open"


@needs("wandb")
def test_weights_and_biases_has_every_column(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = wandb.init()
    rows = trained(WeightsAndBiases(run))
    assert wandb.run is run, "a run of the user's own is left open"
    assert run.summary["val_loss"] == rows[-1]["val_loss"]
    run.finish()
    trained(WeightsAndBiases())
    assert wandb.run is None, "a run of the fit's own is ended with it"

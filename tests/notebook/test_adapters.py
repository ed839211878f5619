"""The live picture beside trainings of other packages: real Lightning, real scvi-tools."""

from __future__ import annotations

import importlib
import logging

import numpy as np
import pytest
import torch

from cellop_nb.data.synthetic import synthetic
from cellop_nb.notebook.adapters import lightning_callback, row_from_metrics
from cellop_nb.notebook.live import LivePlot


@pytest.fixture
def pictures() -> list[bytes]:
    return []


def test_lightning_metrics_become_rows(pictures):
    callback = lightning_callback(LivePlot(publish=pictures.append))
    trainer = type("Trainer", (), {"max_epochs": 2, "current_epoch": 0})()
    metrics = {"train_loss_step": 9.0, "train_loss_epoch": 5.0, "elbo_validation": 4.0, "kl_local_train": 1.0}
    for trainer.current_epoch in range(2):
        trainer.callback_metrics = metrics
        callback.on_train_epoch_end(trainer, None)
    callback.on_train_end(trainer, None)
    assert callback.rows[-1] == {"epoch": 1, "train_loss": 5.0, "val_elbo": 4.0, "train_kl_local": 1.0}
    assert len(pictures) == 2


def test_metric_names_of_several_packages():
    names = {"validation_loss": 1, "val_loss_epoch": 2, "reconstruction_loss_train": 3, "lr-Adam": 4}
    assert row_from_metrics(names) == {"val_loss": 2, "train_reconstruction_loss": 3, "lr-Adam": 4}


# -- real trainings


def line_module(package):
    """A line fitted to a line, which logs its losses as people do; the validation loss rises after epoch 3."""

    class Line(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch, i):
            loss = (self.weight * batch[0] - batch[0]).square().mean()
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, i):
            self.log("validation_loss", abs(self.current_epoch - 3.0) + 1.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Line()


def lightning_trainer(package, **settings):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return package.Trainer(accelerator="cpu", devices=1, **quiet, **settings)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request):
    """Each package that goes by the name of Lightning."""
    found = pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    logging.getLogger(request.param).setLevel(logging.ERROR)
    return found


@pytest.fixture
def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 1)), batch_size=4)


def test_a_lightning_training_is_shown(package, loader, pictures):
    live = LivePlot(publish=pictures.append, every=0.0, budget=1e9)
    callback = lightning_callback(live)
    stopper = importlib.import_module(f"{package.__name__}.callbacks").EarlyStopping(
        "validation_loss", patience=2
    )
    trainer = lightning_trainer(package, max_epochs=20, callbacks=[callback, stopper])
    trainer.fit(line_module(package), loader, loader)
    assert [row["epoch"] for row in callback.rows] == list(range(6)), "epochs 0 to 3, and the two of patience"
    assert [row["val_loss"] for row in callback.rows] == [4.0, 3.0, 2.0, 1.0, 2.0, 3.0]
    losses = [row["train_loss"] for row in callback.rows]
    assert losses == sorted(losses, reverse=True)
    assert len(pictures) >= 6
    words = live._board._headline.get_text()
    assert "finished" in words
    assert "best 4 (val_loss 1)" in words
    assert "patience 2 of 2" in words
    trainer = lightning_trainer(package, max_epochs=-1, max_steps=4, callbacks=[callback])
    trainer.fit(line_module(package), loader, loader)
    assert live.columns.n_rows == 2, "a second training begins anew"
    assert "epoch 2 " in live._board._headline.get_text(), "no number of epochs where there is none"


def test_a_lightning_training_that_fails_leaves_its_picture(package, loader, pictures):
    live = LivePlot(publish=pictures.append, every=1e9)
    module = line_module(package)

    def fail():
        if module.current_epoch == 2:
            raise RuntimeError("no more")

    module.on_train_epoch_start = fail
    with pytest.raises(RuntimeError, match="no more"):
        lightning_trainer(package, max_epochs=5, callbacks=[lightning_callback(live)]).fit(
            module, loader, loader
        )
    assert live.columns.n_rows == 2
    assert "failed" in live._board._headline.get_text()


@pytest.mark.parametrize(("raised", "word"), [(KeyboardInterrupt(), "stopped"), (ValueError("x"), "failed")])
def test_an_end_by_hand_is_not_a_failure(raised, word):
    class Told:
        def update(self, rows, source):
            pass

        def finish(self, rows, source):
            self.status = source.status

    told = Told()
    lightning_callback(told).on_exception(object(), None, raised)
    assert told.status == word


@pytest.mark.slow
def test_an_scvi_training_is_shown(pictures):
    scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed (the extra 'benchmark')")
    adata = synthetic(n_contexts=1, n_perturbations=1, n_cells=60, n_genes=30, n_latent=4, seed=0)
    scvi.model.SCVI.setup_anndata(adata)
    live = LivePlot(publish=pictures.append, every=0.0, budget=1e9)
    callback = lightning_callback(live)
    model = scvi.model.SCVI(adata, n_hidden=8, n_latent=2)
    model.train(max_epochs=3, callbacks=[callback], accelerator="cpu", enable_progress_bar=False,
                check_val_every_n_epoch=1, batch_size=32)  # fmt: skip
    assert len(callback.rows) == 3
    known = model.history
    for ours, theirs in (("train_elbo", "elbo_train"), ("val_elbo", "elbo_validation")):
        expected = known[theirs].iloc[:, 0].astype(float).to_numpy()
        np.testing.assert_allclose([row[ours] for row in callback.rows], expected, rtol=1e-5)
    titles = [panel.title for panel in live._board_key[1:]]
    assert "elbo" in titles
    assert len(pictures) >= 3

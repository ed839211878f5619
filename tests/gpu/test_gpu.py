"""On a GPU: the same numbers as on a CPU, recorded steps as plain ones, and a host that does not wait."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.gpu import Card, _endless
from cellop_nb.analysis.cellop import CellOp
from cellop_nb.analysis.combinations import order_effects, reversal
from cellop_nb.analysis.diagnose import operator_health
from cellop_nb.analysis.distances import transport_scores
from cellop_nb.analysis.genes import axis_genes, response_genes, response_profiles
from cellop_nb.analysis.holdout import CELLOP, holdout
from cellop_nb.analysis.predict import embed
from cellop_nb.data.counts import ResidentCounts
from cellop_nb.data.splits import split
from cellop_nb.data.synthetic import synthetic
from cellop_nb.errors import NonFiniteError
from cellop_nb.models.energy import energy_distance, grouped_energy_distance, self_distance
from cellop_nb.models.likelihood import SparseCounts, nb_log_likelihood_logits
from cellop_nb.notebook.virtual import Question, VirtualCells
from cellop_nb.training.callbacks import Callback
from cellop_nb.training.checkpoint import read_models, write_models
from cellop_nb.training.loop import Machine
from cellop_nb.training.operators import OperatorTrainer, new_operators
from cellop_nb.training.vae import VAETrainer, new_vae

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def adata():
    screen = synthetic(n_contexts=3, n_perturbations=2, n_cells=60, n_genes=120, seed=0)
    split(screen)
    embed(screen, new_vae(screen, n_latent=6, n_hidden=16))
    return screen


def vae(adata, **settings):
    model = new_vae(adata, n_latent=6, n_hidden=16, dropout=settings.pop("dropout", 0.0))
    return VAETrainer(adata, model, batch_size=32, progress=False, **{"max_epochs": 4} | settings)


def operators(adata, **settings):
    given = {"max_epochs": 4, "steps_per_epoch": 8, "cells_per_group": 20, "progress": False}
    return OperatorTrainer(adata, new_operators(adata), **given | settings)


class StopAfter(Callback):
    """Asks for the end after some epochs."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_epoch_end(self, trainer, row):
        if trainer.epoch == self.epochs:
            trainer.stop()


MAKE = {"vae": vae, "operators": operators}


def table(history, columns=("train_loss", "val_loss", "grad_norm")):
    return torch.tensor(history[list(columns)].to_numpy())


@pytest.mark.parametrize(("n", "m"), [(1, 7), (2, 2), (130, 70), (2500, 2100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_distance(n, m, dtype):
    x, y = (5 + torch.randn(k, 8, dtype=torch.float64) for k in (n, m))
    y[0] = x[0]
    found = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        a, b = x.to(dtype).to(device, kind).requires_grad_(), y.to(dtype).to(device, kind).requires_grad_()
        value = energy_distance(a, b, estimator="V")
        found.append([part.cpu().double() for part in (value, *torch.autograd.grad(value, (a, b)))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)


def test_energy_distance_of_groups():
    sizes = [3, 50, 700, 20], [9, 30, 900, 21]
    x, y = (torch.randn(sum(n), 5) for n in sizes)
    found = []
    for device in ("cuda", "cpu"):
        a = x.to(device).requires_grad_()
        value = grouped_energy_distance(a, y.to(device), *sizes, y_self=self_distance(y.to(device), sizes[1]))
        found.append((value.cpu(), torch.autograd.grad(value.sum(), a)[0].cpu()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_likelihood():
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.rand(40, 300, generator=generator) * torch.tensor([0.1, 3.0, 400.0]).repeat(100))
    logits, r = torch.randn(40, 300, generator=generator), torch.rand(300, generator=generator) * 5 + 1e-3
    found = []
    for device, kind in (("cuda", torch.float32), ("cpu", torch.float64)):
        given = [part.to(device, kind).requires_grad_() for part in (logits, x.sum(1), r)]
        value = nb_log_likelihood_logits(SparseCounts.from_dense(x.to(device, kind)), *given)
        found.append([p.cpu().double() for p in (value, *torch.autograd.grad(value.sum(), given))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_recorded_steps_are_the_plain_ones(kind, precision, adata):
    trainer = MAKE[kind](adata, machine=Machine(precision=precision))
    plain = Machine(precision=precision, cuda_graphs=False)
    found, expected = trainer.fit(), MAKE[kind](adata, machine=plain).fit()
    assert trainer.recorder.replayed > len(found)
    torch.testing.assert_close(
        table(found), table(expected), rtol=1e-4 if precision == "32-true" else 2e-3, atol=1e-4
    )


def test_recorded_dropout_is_drawn_anew_in_every_step(adata):
    """Its draws come from the GPU's own source, which each replay moves on."""
    plain, recorded = (vae(adata, dropout=0.3, machine=Machine(cuda_graphs=on)).fit() for on in (False, None))
    torch.testing.assert_close(table(recorded), table(plain), rtol=1e-4, atol=1e-4)


def test_a_fit_is_that_of_a_cpu(adata):
    """The operators draw their cells on the host, and nothing else is random."""
    there, here = operators(adata).fit(), operators(adata, machine=Machine(accelerator="cpu")).fit()
    torch.testing.assert_close(table(there), table(here), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("kind", MAKE)
def test_the_host_does_not_wait(kind, recorded, adata):
    trainer = MAKE[kind](adata, machine=Machine(cuda_graphs=recorded))
    call = _endless(trainer)
    for _ in range(12):
        call()
    assert Card().waits(call, 30) == 0
    assert (trainer.recorder is not None and trainer.recorder.replayed > 20) == recorded
    assert Card().waits(lambda: float(torch.ones(1, device="cuda")), 3) == 3  # the count can fail


@pytest.mark.parametrize("kind", MAKE)
def test_a_fault_is_told_by_its_step_and_leaves_a_usable_model(kind, adata):
    trainer = MAKE[kind](adata, max_epochs=6)
    batches, wanted = trainer.batches, 21

    def spoilt():
        for number, batch in enumerate(batches(), start=trainer.step):
            if number == wanted:
                trainer.weights[next(iter(trainer.weights))] = math.nan
            yield batch

    trainer.batches = spoilt
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    assert caught.value.step == wanted and trainer.recorder.replayed > 0
    assert all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values())


def test_the_cell_and_gene_of_a_bad_count(adata):
    trainer = vae(adata)
    held = trainer.loader.matrix
    row = int(trainer.loader.rows[5])
    place = held.source.csr.indptr[row]
    held.source.csr.data[place] = held.values[int(place)] = math.nan
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    assert caught.value.origin.kind == "batch" and caught.value.cells == [adata.obs_names[row]]
    assert caught.value.genes == [adata.var_names[held.source.csr.indices[place]]]


def test_changes_by_hand_reach_a_recorded_step(adata):
    def history(**given):
        trainer = vae(adata, **given)
        trainer.fit(2)
        trainer.change("kl_weight", 3.0)
        trainer.change("learning_rate", 1e-4)
        return table(trainer.fit(4))

    torch.testing.assert_close(history(), history(machine=Machine(cuda_graphs=False)), rtol=1e-4, atol=1e-4)


def test_the_counts_stay_on_the_device_and_a_run_is_resumed_exactly(adata, tmp_path):
    whole = vae(adata, folder=tmp_path / "whole", max_epochs=6)
    assert isinstance(whole.loader.matrix, ResidentCounts)
    expected = whole.fit()
    first = vae(adata, folder=tmp_path / "parts", max_epochs=6, callbacks=[StopAfter(3)])
    assert len(first.fit()) == 3
    found = vae(adata, folder=tmp_path / "parts", max_epochs=6).fit(resume=True)
    torch.testing.assert_close(table(found), table(expected), rtol=1e-5, atol=1e-5)


def test_a_model_goes_there_and_back(adata, tmp_path):
    trainer = vae(adata)
    trainer.fit()
    assert next(trainer.model.parameters()).is_cuda
    path = write_models(tmp_path / "model.cellop", trainer.model)
    here, there = read_models(path).vae, read_models(path).vae.to("cuda")
    assert next(there.parameters()).is_cuda and not next(here.parameters()).is_cuda
    np.testing.assert_allclose(_latents(adata, there), _latents(adata, here), rtol=1e-3, atol=1e-4)


def _latents(adata, model):
    own = adata.copy()
    embed(own, model)
    return own.obsm["X_nbvae"]


@pytest.fixture(scope="module")
def trained(adata):
    """`adata, vae, operators`: the models as a training leaves them on the card."""
    own = adata.copy()
    first = vae(own)
    first.fit()
    embed(own, first.model)
    second = operators(own)
    second.fit()
    return own, first.model.eval(), second.model.eval()


@pytest.fixture(scope="module")
def predictor(adata):
    """A predictor that was fitted on the card."""
    return _brief(CellOp(adata, n_latent=6)).fit(progress=False)


def _brief(model):
    model.recipe = replace(model.recipe, n_hidden=16, vae_epochs=3, finish_epochs=1, operator_epochs=1)
    return model


def test_predictions(predictor):
    question = {"context": predictor.adata.obs["cell_type"].iloc[0], "perturbation": "drug 1"}
    cells, again = (predictor.predict(**question) for _ in range(2))
    assert cells.n_obs and np.isfinite(cells.X.sum()) and (cells.X != again.X).nnz == 0
    assert np.isfinite(predictor.plan(*question.values()).change).all()


def test_what_was_trained_there_is_analysed(trained):
    """Every analysis takes models that a training has left on the card, and gives what they give on a CPU."""
    own, *there = trained
    here = copy.deepcopy(there[0]).cpu(), copy.deepcopy(there[1]).cpu()
    for name, question in QUESTIONS.items():
        found, expected = (_in_order(question(own, *pair)) for pair in (there, here))
        pd.testing.assert_frame_equal(found, expected, rtol=1e-2, atol=1e-3, obj=name)


QUESTIONS = {
    "scores": lambda adata, vae, operators: transport_scores(adata, operators),
    "health": lambda adata, vae, operators: operator_health(operators),
    "genes": lambda adata, vae, operators: response_genes(adata, vae, operators, n_top=None),
    "axes": axis_genes,
    "order": lambda adata, vae, operators: order_effects(adata, operators),
    "reversal": lambda adata, vae, operators: reversal(adata, operators),
    "profiles": lambda adata, vae, operators: response_profiles(operators),
    "explorer": lambda adata, vae, operators: _moves(
        VirtualCells(CellOp(adata, n_genes=None, vae=vae, operators=operators).fit(progress=False))
    ),
}


def _in_order(table):
    """Rows by their words: numbers that differ in the last digit may rank them otherwise."""
    plain = pd.DataFrame(table).reset_index(drop=isinstance(table.index, pd.RangeIndex))
    words = [name for name in plain if not pd.api.types.is_numeric_dtype(plain[name])]
    return plain.sort_values(words).reset_index(drop=True)


def _moves(cells):
    """Genes of one answer by name, and its energy distance."""
    asked = Question(cells.perturbations[0], cells.contexts[0], strength=0.5)
    answer = cells.ask(asked)
    assert cells.to_adata(asked).n_obs
    return answer.genes[["gene", "lfc"]].assign(energy=answer.energy)


def test_a_hold_out_is_trained_there(adata):
    only = [adata.obs["cell_type"].iloc[0]]
    result = holdout(_brief(CellOp(adata, n_latent=4)), only=only, metrics=["e_distance"], progress=False)
    assert np.isfinite(result.summary()[CELLOP]).all()

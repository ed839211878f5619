"""Training of the VAE: from counts to a better ELBO, seeded, resumable, blind to test cells."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch
from toy import CPU, Do, assert_same_run, weights_of

from cellop_nb.analysis.predict import embed
from cellop_nb.data.contract import Keys
from cellop_nb.data.splits import split
from cellop_nb.data.synthetic import synthetic
from cellop_nb.errors import DataError, LabelError
from cellop_nb.models.vae import elbo_loss, kl_to_standard_normal
from cellop_nb.training import vae
from cellop_nb.training.vae import VAETrainer, new_vae

SIZES = {"n_latent": 3, "n_hidden": 8}


@pytest.fixture(scope="module")
def screen():
    adata = synthetic(
        n_contexts=1, n_perturbations=2, n_cells=40, n_genes=30, n_latent=4, library=60.0, seed=0
    )
    split(adata, test_fraction=0.2, val_fraction=0.2)
    return adata


def trainer_of(adata, **settings):
    given = {
        "max_epochs": 4,
        "batch_size": 16,
        "lr": 1e-2,
        "warmup_epochs": 2,
        "progress": False,
        "machine": CPU,
    }
    model = new_vae(adata, covariate_keys=["batch"], dropout=0.1, **SIZES)
    return VAETrainer(adata, model, **given | settings)


def test_training_improves_the_bound_on_held_out_cells(screen):
    history = trainer_of(screen, max_epochs=25).fit()
    assert history["val_loss"].min() < history["val_loss"][0] - 1
    terms = history["val_reconstruction"] + history["val_kl"]
    assert np.allclose(history["val_loss"], terms)
    assert (history["train_kl"] >= 0).all()


def test_a_training_of_no_said_length_looks_at_a_bounded_number_of_cells(screen, monkeypatch):
    n = int((screen.obs["split"] == "train").sum())
    for most, epochs in ((7 * n, 7), (1, 2), (100 * n, 32)):
        monkeypatch.setattr(vae, "MOST_VISITS", most)
        assert VAETrainer(screen, new_vae(screen, **SIZES)).max_epochs == epochs
    monkeypatch.setattr(vae, "MOST_VISITS", 1)
    assert VAETrainer(screen, new_vae(screen, **SIZES), max_epochs=30).max_epochs == 30


def test_equal_seeds_give_bit_equal_runs(screen):
    one, two = trainer_of(screen, seed=2), trainer_of(screen, seed=2)
    one.fit()
    torch.manual_seed(99)
    two.fit()
    assert_same_run(one, two)


def test_a_resumed_run_equals_an_uninterrupted_one(screen, tmp_path):
    plain = trainer_of(screen)
    plain.fit()
    trainer_of(screen, callbacks=[Do(lambda t: t.save_checkpoint(tmp_path / "two.pt"), epoch=1)]).fit()
    resumed = trainer_of(screen)
    resumed.load_checkpoint(tmp_path / "two.pt")
    resumed.fit()
    assert_same_run(plain, resumed)


def test_test_cells_are_never_read(screen):
    """Ruin the test cells: nothing changes."""
    ruined = screen.copy()
    dense = ruined.X.toarray()
    dense[(ruined.obs["split"] == "test").to_numpy()] = 1000
    ruined.X = dense
    one, two = trainer_of(screen), trainer_of(ruined)
    one.fit()
    two.fit()
    assert_same_run(one, two)


def test_validation_cells_never_train(screen):
    """Other counts in them change the validation, and no step."""
    other = screen.copy()
    dense = other.X.toarray()
    dense[(other.obs["split"] == "val").to_numpy()] += 3
    other.X = dense
    one, two = trainer_of(screen).fit(), trainer_of(other).fit()
    assert one["train_loss"].equals(two["train_loss"])
    assert not np.allclose(one["val_loss"], two["val_loss"])


def test_the_divergence_warms_up_but_is_validated_in_full(screen):
    trainer = trainer_of(screen, warmup_epochs=4, kl_weight=0.5)
    weights = []
    trainer.callbacks += [Do(lambda t: weights.append(t.kl_weight), step=step) for step in (1, 8, 15, 22)]
    assert trainer.steps_per_epoch() <= 7
    trainer.fit()
    assert weights == sorted(weights)
    assert weights[0] == 0.125
    trainer.epoch = 100
    assert trainer.kl_weight == 0.5


def test_validation_is_the_elbo_of_the_validation_cells(screen):
    trainer = trainer_of(screen, batch_size=7)
    trainer.model.eval()
    rows = np.flatnonzero(screen.obs["split"] == "val")
    x = torch.as_tensor(screen.X[rows].toarray())
    codes = {"batch": torch.as_tensor(screen.obs["batch"].cat.codes.to_numpy()[rows].copy()).long()}
    noise = torch.Generator().manual_seed(trainer.seed)
    with torch.no_grad():
        log_likelihood, posterior = trainer.model(x, x.sum(1), codes, generator=noise)
    expected = elbo_loss(log_likelihood, posterior, 1.0)
    found = trainer.validate()
    assert trainer.validate() == found, "the noise is another each time: epochs cannot be compared"
    assert found["val_reconstruction"] == pytest.approx(float(expected["reconstruction"]), rel=1e-5)
    assert found["val_kl"] == pytest.approx(float(kl_to_standard_normal(posterior).mean()), rel=1e-5)


def test_training_makes_the_posterior_less_like_the_prior_than_a_heavy_divergence_does(screen):
    """A sign flip of the divergence would reward distance from the prior instead."""
    kls = [
        trainer_of(screen, kl_weight=weight, max_epochs=15).fit()["train_kl"].iloc[-1] / weight
        for weight in (0.01, 10)
    ]
    assert 0 <= kls[1] < kls[0]


def test_the_step_gets_the_weight_that_was_set_while_running(screen):
    trainer = trainer_of(screen, callbacks=[Do(lambda t: t.weights.update(kl_weight=0.0), epoch=1)])
    history = trainer.fit()
    assert history["kl_weight"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert (history["train_kl"][2:] == 0).all()


def test_every_parameter_learns(screen):
    trainer = trainer_of(screen, max_epochs=2)
    before = weights_of(trainer)
    trainer.fit()
    assert [name for name, value in weights_of(trainer).items() if torch.equal(value, before[name])] == []


def test_a_batch_is_described_by_its_cells_and_genes(screen):
    trainer = trainer_of(screen)
    batch = next(iter(trainer.batches()))
    told = trainer.describe_batch(batch)
    assert told["genes"] == list(screen.var_names)
    x = screen[told["cells"]].X.toarray()
    assert np.array_equal(x, batch.x.numpy())


# -- the start --------------------------------------------------------------------------------------------


def test_a_new_vae_starts_at_the_training_cells_gene_means(screen):
    vae = new_vae(screen, **SIZES)
    train = screen[screen.obs["split"] == "train"].X.toarray()
    share = train.sum(0) / train.sum()
    seen = share > 0
    bias = vae.decoder.linear.bias.detach().numpy()
    np.testing.assert_allclose(np.exp(bias[seen]), share[seen], rtol=1e-4)


def test_a_new_vae_is_seeded(screen):
    states = [new_vae(screen, seed=seed, **SIZES).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(states[0]["encoder.mean.weight"], states[1]["encoder.mean.weight"])
    assert not torch.equal(states[0]["encoder.mean.weight"], states[2]["encoder.mean.weight"])


@pytest.mark.parametrize("kind", ["uint8", "int16", "dense"])
def test_small_integers_do_not_overflow_in_the_dispersion(screen, kind):
    wide, narrow = screen.copy(), screen.copy()
    wide.X = screen.X.toarray().astype(np.float64) + 20
    narrow.X = wide.X.astype({"dense": "float32"}.get(kind, kind))
    expected, found = (new_vae(adata, **SIZES).decoder.dispersion for adata in (wide, narrow))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_the_dispersion_of_poisson_and_overdispersed_genes_is_told_apart():
    rng = np.random.default_rng(0)
    rate = np.column_stack([np.full(3000, 5.0), 5 * rng.gamma(0.5, 2.0, 3000), np.full((3000), 200.0)])
    adata = ad.AnnData(rng.poisson(rate).astype(np.float32))
    adata.obs["split"] = "train"
    Keys().write(adata)
    poisson, bursty, _ = new_vae(adata, n_latent=2, n_hidden=2).decoder.dispersion.tolist()
    assert poisson > 20
    assert bursty == pytest.approx(0.5, rel=0.2)


# -- refusals ---------------------------------------------------------------------------------------------


def test_genes_in_another_order_are_put_in_order(screen):
    vae = new_vae(screen, **SIZES)
    settings = {"progress": False, "machine": CPU, "max_epochs": 1}
    plain = VAETrainer(screen, vae, **settings).validate()
    shuffled = VAETrainer(screen[:, ::-1].copy(), vae, **settings).validate()
    assert shuffled == pytest.approx(plain)


def test_missing_genes_and_splits_are_refused(screen):
    vae = new_vae(screen, **SIZES)
    with pytest.raises(DataError, match="all genes of the model"):
        VAETrainer(screen[:, 1:].copy(), vae, progress=False)
    unsplit = screen.copy()
    del unsplit.obs["split"]
    with pytest.raises(LabelError, match="'split'"):
        VAETrainer(unsplit, vae, progress=False)


def test_other_genes_let_the_modelled_ones_rise_together():
    """Of the total, a drug doubles the share that the modelled genes have: with totals the VAE sees it."""
    adata = synthetic(n_cells=60, n_genes=60, n_perturbations=1, seed=3)
    adata.obs["total_counts"] = np.asarray(adata.X.sum(1)).ravel()
    adata = adata[:, :20].copy()
    adata.X[np.flatnonzero(adata.obs["perturbation"] != "control")] *= 2
    adata.obs["total_counts"] = np.maximum(adata.obs["total_counts"], np.asarray(adata.X.sum(1)).ravel())
    split(adata, seed=0)
    vae = new_vae(adata, n_latent=4, n_hidden=16, total_key="total_counts")
    assert vae.columns == [*adata.var_names, "other genes"]
    VAETrainer(adata, vae, max_epochs=30, lr=1e-2, batch_size=24, warmup_epochs=20, progress=False).fit()
    embed(adata, vae)
    z, library = torch.as_tensor(adata.obsm["X_nbvae"]), torch.full((adata.n_obs,), 100.0)
    with torch.no_grad():
        counts = vae.cpu().decode(z, library).mean
    assert counts.shape == adata.shape
    share = (counts.sum(1) / 100).numpy()
    drug = (adata.obs["perturbation"] != "control").to_numpy()
    observed = np.asarray(adata.X.sum(1)).ravel() / adata.obs["total_counts"].to_numpy()
    assert share[drug].mean() / share[~drug].mean() == pytest.approx(
        observed[drug].mean() / observed[~drug].mean(), rel=0.1
    )

"""Published predictors on one question, each run in an environment of its own: `python peer_models.py NAME FOLDER SEED`.

`FOLDER/train.h5ad` has the training cells, the controls of the asked context among them: counts in ``X``, log1p of shares
of 10,000 counts in ``layers["log1p"]``, ``obs`` with ``context`` and ``perturbation``, and the question
in ``uns["question"]``. `FOLDER/predicted.h5ad` gets the asked context's control cells as the peer says they would be.
This file imports no cellop_nb: only its own predictor does.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import anndata as ad
import numpy as np

Predict = Callable[[ad.AnnData], tuple[np.ndarray, str]]
"""Control cells to predicted values (cell, gene), and their space: "counts" or "log1p"."""


def cellop_nb(train: ad.AnnData, seed: int) -> Predict:
    """This package, as its README shows it."""
    import cellop_nb as co

    question = train.uns.pop("question")
    co.setup(train, perturbation_key="perturbation", context_key="context", control=str(question["control"]))
    model = co.CellOp(train, n_genes=None, seed=seed).fit(progress=False)
    asked = {key: str(question[key]) for key in ("context", "perturbation")}
    return lambda controls: (model.predict(**asked).X.toarray(), "counts")


def scvi(train: ad.AnnData, seed: int) -> Predict:
    """scvi-tools' SCVI: control cells plus the mean shift of latents (each context counts alike), counts drawn."""
    import torch
    from scvi import settings
    from scvi.model import SCVI

    settings.seed = seed
    question = train.uns["question"]
    SCVI.setup_anndata(train)
    model = SCVI(train, n_latent=32, gene_likelihood="nb")
    model.train(accelerator="cpu", early_stopping=True, enable_progress_bar=False)
    shift = _latent_shift(model.get_latent_representation(), train.obs, question["control"])

    def predict(controls: ad.AnnData) -> tuple[np.ndarray, str]:
        latents = torch.tensor(model.get_latent_representation(controls) + shift)
        library = torch.tensor(np.log(np.asarray(controls.X.sum(axis=1)))).float()
        with torch.inference_mode():
            decoded = model.module.generative(
                latents, library, torch.zeros(len(latents), 1, dtype=torch.long)
            )
        return decoded["px"].sample().numpy(), "counts"

    return predict


def _latent_shift(latents: np.ndarray, obs, control: str) -> np.ndarray:
    """(latent,) mean over contexts with perturbed cells of their mean change."""
    treated = (obs["perturbation"] != control).to_numpy()
    shifts = []
    for context in obs["context"][treated].unique():
        inside = (obs["context"] == context).to_numpy()
        shifts.append(latents[inside & treated].mean(axis=0) - latents[inside & ~treated].mean(axis=0))
    return np.mean(shifts, axis=0)


def scgen(train: ad.AnnData, seed: int) -> Predict:
    """scGen 2.1.0 as in its tutorial on this screen, with what it needs of the scvi-tools of its day."""
    import scvi.module.base as base
    from scvi import settings

    compat = ModuleType("scvi._compat")
    compat.Literal = __import__("typing").Literal
    sys.modules["scvi._compat"] = compat
    base.LossRecorder = lambda loss, reconstruction, kl: base.LossOutput(
        loss=loss, reconstruction_loss=reconstruction, kl_local=kl
    )
    from scgen import SCGEN, SCGENVAE

    infer = SCGENVAE.inference
    SCGENVAE.inference = lambda self, x: (out := infer(self, x)) | {"qzm": out["qz_m"], "qzv": out["qz_v"]}

    settings.seed = seed
    question, train = train.uns["question"], _logarithms(train)
    SCGEN.setup_anndata(train, batch_key="perturbation", labels_key="context")
    model = SCGEN(train)
    model.train(
        max_epochs=100, batch_size=32, early_stopping=True, early_stopping_patience=25,
        accelerator="cpu", enable_progress_bar=False,
    )  # fmt: skip

    def predict(controls: ad.AnnData) -> tuple[np.ndarray, str]:
        cells, _ = model.predict(
            ctrl_key=question["control"],
            stim_key=question["perturbation"],
            adata_to_predict=_logarithms(controls),
        )
        return np.asarray(cells.X), "log1p"

    return predict


def _logarithms(adata: ad.AnnData) -> ad.AnnData:
    """The same cells with dense logarithms in ``X``."""
    return ad.AnnData(adata.layers["log1p"].toarray(), obs=adata.obs.copy(), var=adata.var.copy())


def scpram(train: ad.AnnData, seed: int) -> Predict:
    """scPRAM 0.0.3 with its defaults: optimal transport and attention in the latent space."""
    import torch
    from scpram.models import SCPRAM

    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what the package draws from)
    question, train = train.uns["question"], _logarithms(train)
    model = SCPRAM(input_dim=train.n_vars, device="cpu")
    model.train_SCPRAM(train)
    names = {
        "condition_key": "perturbation", "cell_type_key": "context", "ctrl_key": question["control"],
        "stim_key": question["perturbation"], "pred_key": "predicted",
    }  # fmt: skip
    context = question["context"]
    return lambda controls: (model.predict(train, context, names).to_df().loc[controls.obs_names], "log1p")


def lemur(train: ad.AnnData, seed: int) -> Predict:
    """LEMUR: one subspace per condition, aligned with Harmony; its prediction is smooth."""
    from pylemur.tl import LEMUR

    np.random.seed(seed)  # noqa: NPY002
    perturbation, train = train.uns["question"]["perturbation"], _logarithms(train)
    model = LEMUR(train, design="~ perturbation", n_embedding=15)
    model.fit(verbose=False)
    model.align_with_harmony(verbose=False)

    def predict(controls: ad.AnnData) -> tuple[np.ndarray, str]:
        embedding = model.embedding[train.obs_names.get_indexer(controls.obs_names)]
        return model.predict(embedding, new_condition=model.cond(perturbation=perturbation)), "log1p"

    return predict


def biolord(train: ad.AnnData, seed: int) -> Predict:
    """biolord with the settings of its tutorials, a tenth of the cells for early stopping."""
    from biolord import Biolord

    question, train = train.uns["question"], _logarithms(train)
    train.obs["split"] = np.where(np.random.default_rng(seed).random(train.n_obs) < 0.9, "train", "test")
    Biolord.setup_anndata(train, categorical_attributes_keys=["perturbation", "context"])
    network = {
        "decoder_width": 1024, "decoder_depth": 4, "attribute_nn_width": 512, "attribute_nn_depth": 2,
        "n_latent_attribute_categorical": 4, "gene_likelihood": "normal", "reconstruction_penalty": 1e2,
        "unknown_attribute_penalty": 1e1, "unknown_attribute_noise_param": 1e-1, "attribute_dropout_rate": 0.1,
        "use_batch_norm": False, "use_layer_norm": False, "seed": seed,
    }  # fmt: skip
    plan = {
        "n_epochs_warmup": 0, "latent_lr": 1e-4, "latent_wd": 1e-4, "decoder_lr": 1e-4, "decoder_wd": 1e-4,
        "attribute_nn_lr": 1e-2, "attribute_nn_wd": 4e-8, "step_size_lr": 45, "cosine_scheduler": True,
        "scheduler_final_lr": 1e-5,
    }  # fmt: skip
    model = Biolord(train, n_latent=32, module_params=network, split_key="split")
    model.train(
        max_epochs=500, batch_size=512, plan_kwargs=plan, early_stopping=True, early_stopping_patience=20,
        check_val_every_n_epoch=10, enable_checkpointing=False, accelerator="cpu",
    )  # fmt: skip

    def predict(controls: ad.AnnData) -> tuple[np.ndarray, str]:
        source = train[controls.obs_names].copy()
        cells = model.compute_prediction_adata(train, source, target_attributes=["perturbation"])
        return cells[cells.obs["perturbation"] == question["perturbation"]].X, "log1p"

    return predict


def cellflow(train: ad.AnnData, seed: int) -> Predict:
    """CellFlow in 50 components, its networks narrowed to a CPU's size."""
    import optax
    from cellflow.model import CellFlow

    question, train = train.uns["question"], _logarithms(train)
    middle = train.X.mean(axis=0)
    _, _, axes = np.linalg.svd(train.X - middle, full_matrices=False)
    axes = axes[:50]

    def described(adata: ad.AnnData) -> ad.AnnData:
        adata.obsm["components"] = (adata.X - middle) @ axes.T
        adata.obs["is_control"] = (adata.obs["perturbation"] == question["control"]).to_numpy()
        adata.obs["treated"] = ~adata.obs["is_control"]
        adata.obs["context"] = adata.obs["context"].astype("category")
        return adata

    model = CellFlow(described(train[(train.obs["context"] != question["context"]).to_numpy()].copy()))
    model.prepare_data(
        "components",
        "is_control",
        perturbation_covariates={"treatment": ["treated"]},
        split_covariates=["context"],
    )
    model.prepare_model(
        condition_embedding_dim=32, time_freqs=256, time_encoder_dims=(256, 256), hidden_dims=(256, 256),
        decoder_dims=(512, 512), optimizer=optax.adam(5e-4), layers_before_pool=(), layers_after_pool=(),
        conditioning_kwargs={}, seed=seed,
    )  # fmt: skip
    model.train(2000, batch_size=256, valid_freq=10**9)

    def predict(controls: ad.AnnData) -> tuple[np.ndarray, str]:
        source = described(_logarithms(controls))
        asked = source.obs.iloc[:1].assign(is_control=False, treated=True)
        (moved,) = model.predict(source, asked, sample_rep="components").values()
        return np.asarray(moved) @ axes + middle, "log1p"

    return predict


PEERS: dict[str, tuple[Callable[[ad.AnnData, int], Predict], str, str]] = {
    "cellop_nb": (cellop_nb, "cellop_nb", "cellop_nb"),
    "scvi": (scvi, "scvi.model", "scvi-tools"),
    "scgen": (scgen, "scvi.model", "scgen"),
    "scpram": (scpram, "scpram", "scpram"),
    "lemur": (lemur, "pylemur", "pylemur"),
    "biolord": (biolord, "biolord", "biolord"),
    "cellflow": (cellflow, "cellflow", "cellflow-tools"),
}
"""Name to predictor, the module that is imported before the clock starts, and the package whose version is told."""


def main(name: str, folder: Path, seed: int) -> None:
    """Fit and predict with one peer, and write the cells with what they cost."""
    peer, module, package = PEERS[name]
    import_module(module)
    train = ad.read_h5ad(folder / "train.h5ad")
    question = dict(train.uns["question"])
    chosen = (train.obs["context"] == question["context"]) & (
        train.obs["perturbation"] == question["control"]
    )
    controls = train[chosen.to_numpy()].copy()
    start = time.process_time()
    predict = peer(train, seed)
    fitted = time.process_time()
    values, space = predict(controls)
    end = time.process_time()
    obs = controls.obs.assign(perturbation=question["perturbation"])
    cells = ad.AnnData(np.asarray(values, dtype=np.float32), obs=obs, var=controls.var)
    cells.uns["cost"] = {
        "version": f"{package} {metadata.version(package)}",
        "space": space,
        "fit_cpu_seconds": fitted - start,
        "predict_cpu_seconds": end - fitted,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    cells.write_h5ad(folder / "predicted.h5ad")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))

"""The number of threads: nothing of ours changes it, and no result depends on it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import cellop_nb as co
from cellop_nb.models.energy import grouped_energy_distance
from cellop_nb.models.likelihood import SparseCounts, nb_log_likelihood_logits
from cellop_nb.packages import same_threads
from cellop_nb.training.loop import Machine
from cellop_nb.training.operators import OperatorTrainer, new_operators
from cellop_nb.training.vae import VAETrainer, new_vae


@contextlib.contextmanager
def threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def screen():
    adata = co.datasets.synthetic(n_contexts=2, n_perturbations=2, n_cells=60, n_genes=80)
    co.split(adata)
    return adata


def test_what_others_set_is_taken_back():
    with threads(2):
        with same_threads():
            torch.set_num_threads(3)
        assert torch.get_num_threads() == 2


def test_choosing_genes_leaves_torch_with_its_one_thread():
    """numba sets its own number when it starts its threads: once in a process, hence a fresh one."""
    code = (
        "import sys, torch; from cellop_nb.data.synthetic import synthetic; "
        "from cellop_nb.data.genes import select_genes; before = torch.get_num_threads(); "
        "select_genes(synthetic(n_cells=60, n_genes=80), 40, flavor='seurat', split=None); "
        "assert 'numba' in sys.modules; "
        "print(before, torch.get_num_threads())"
    )
    given = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["1", "1"], done.stderr


# -- results ---------------------------------------------------------------------------------------------------


def with_gradient(call, *inputs):
    given = [value.clone().requires_grad_() for value in inputs]
    value = call(*given)
    return [value.detach(), *torch.autograd.grad(value.sum(), given)]


def clouds(cells: int, d: int = 8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(cells, d, generator=generator) for _ in range(2)]


def likelihood():
    """Value and gradient of 700 cells: several turns of the likelihood."""
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.rand(700, 900, generator=generator) * 0.4, generator=generator)
    counts, library = SparseCounts.from_dense(x), x.sum(1)
    z, w, a = (torch.randn(*shape, generator=generator) for shape in ((700, 6), (900, 6), (900,)))
    return with_gradient(lambda t, r: nb_log_likelihood_logits(counts, t, library, r), z @ w.T, a.abs() + 0.1)


RESULTS = {
    "energy, tiled": lambda: with_gradient(co.energy_distance, *clouds(1500)),
    "energy, groups": lambda: with_gradient(
        lambda x, y: grouped_energy_distance(x, y, [100, 40, 60], [50, 90, 60]), *clouds(200)
    ),
    "likelihood of logits": likelihood,
}


@pytest.mark.parametrize("name", RESULTS)
def test_value_and_gradient_do_not_depend_on_the_threads(name):
    """To the rounding of a sum in another order: BLAS and reductions cut their work by threads."""
    with threads(1):
        one = RESULTS[name]()
    for number in (2, 3):
        with threads(number):
            for value, expected in zip(RESULTS[name](), one, strict=True):
                scale = float(expected.abs().max())
                torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-6 * scale)


def test_the_same_threads_give_the_same_bits():
    for name in RESULTS:
        with threads(2):
            for value, again in zip(RESULTS[name](), RESULTS[name](), strict=True):
                assert torch.equal(value, again), name


def test_training_does_not_depend_on_the_threads(screen):
    """Both trainers draw the same cells and noise whatever the threads; the losses differ by rounding alone."""
    histories = []
    for number in (1, 2):
        with threads(number):
            vae = new_vae(screen, n_latent=4, n_hidden=16)
            settings = {"max_epochs": 3, "progress": False, "machine": Machine(accelerator="cpu")}
            first = VAETrainer(screen, vae, batch_size=32, **settings).fit()
            co.embed(screen, vae)
            operators = new_operators(screen)
            second = OperatorTrainer(screen, operators, steps_per_epoch=5, **settings).fit()
        histories.append([first["val_loss"].to_numpy(), second["val_loss"].to_numpy()])
    for one, two in zip(*histories, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4)

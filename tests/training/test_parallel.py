"""Two processes (gloo) do what one does with the joint batch."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch
from toy import LineTrainer, joint_run, one_of, one_with_a_fault, small_operators, small_vae

from cellop_nb.data.counts import CountLoader, CountMatrix
from cellop_nb.errors import ModelError
from cellop_nb.models import vae as vae_module
from cellop_nb.training.loop import Machine


@pytest.fixture
def without_noise(monkeypatch):
    monkeypatch.setattr(vae_module, "sample_z", vae_module.sample_z)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def run_two(processes, kind, folder, target=one_of):
    folder.mkdir()
    port = free_port()
    pair = [processes.Process(target=target, args=(rank, 2, port, kind, str(folder))) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", ["vae", "operators"])
def test_two_processes_give_the_gradients_of_one_with_the_joint_batch(
    kind, processes, tmp_path, without_noise
):
    one = joint_run(kind, None)
    first, second = run_two(processes, kind, tmp_path / "two")
    assert first["gradients"].keys() == second["gradients"].keys() == one.first_gradients.keys()
    for name, gradient in one.first_gradients.items():
        assert torch.equal(first["gradients"][name], second["gradients"][name]), name
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert any(gradient.abs().max() > 0 for gradient in first["gradients"].values())
    assert all(torch.equal(first["weights"][name], value) for name, value in second["weights"].items())
    assert (
        first["val_loss"] == second["val_loss"] == pytest.approx(one.history["val_loss"].tolist(), rel=1e-3)
    )
    for mine, theirs, alone in zip(first["rows"], second["rows"], one.rows, strict=True):
        assert mine["train_loss"] == theirs["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-3)
    written = {path.name for path in (tmp_path / "two").iterdir()}
    assert written == {"0.pt", "1.pt", "best.pt", "last.pt", "history.csv"}


def test_a_fault_in_one_process_takes_both_back(processes, tmp_path):
    first, second = run_two(processes, "rollback", tmp_path / "two", target=one_with_a_fault)
    assert first["epochs"] == second["epochs"] == 2
    assert [len(one["rolled_back"]) for one in (first, second)] == [1, 1]
    assert first["rolled_back"][0]["back_to"] == second["rolled_back"][0]["back_to"] == 2
    assert "in another process" in first["rolled_back"][0]["reason"]
    assert all(torch.equal(first["weights"][name], value) for name, value in second["weights"].items())


def test_a_fault_in_one_process_stops_both_and_each_says_where_it_was(processes, tmp_path):
    first, second = run_two(processes, "stop", tmp_path / "two", target=one_with_a_fault)
    assert "step 3" in first["message"] and "in another process" in first["message"]
    assert "step 3" in second["message"] and "another process" not in second["message"]


@pytest.mark.parametrize(("n", "size", "batch_size"), [(53, 2, 10), (53, 3, 10), (41, 4, 8), (7, 2, 3)])
def test_shares_are_a_partition_of_every_joint_batch(n, size, batch_size):
    matrix = CountMatrix(np.eye(n, dtype="f4"))

    def loader(rank, of):
        generator = torch.Generator().manual_seed(5)
        return CountLoader(matrix, batch_size=batch_size, generator=generator, share=(rank, of))

    joint = [batch.index.tolist() for batch in loader(0, 1)]
    parts = [list(loader(rank, size)) for rank in range(size)]
    assert {len(part) for part in parts} == {len(loader(0, size))}
    for whole, *shares in zip(joint, *parts, strict=False):
        assert sorted(whole) == sorted(cell for share in shares for cell in share.index.tolist())
        assert all(len(share) for share in shares)
    left_out = len(joint) - len(parts[0])
    assert left_out == (0 < n % batch_size < size)


def test_a_part_of_a_draw_holds_the_chosen_groups():
    trainer = small_operators(None)
    sample = trainer.groups.sample(9, torch.Generator().manual_seed(1))
    for chosen in ([0], [1], [1, 0]):
        part = sample.part(chosen)
        assert part.which == [sample.which[k] for k in chosen]
        assert torch.equal(part.perturbed, trainer.groups.pool[part.perturbed_rows])
        assert torch.equal(part.control, trainer.groups.pool[part.control_rows])
        assert len(part.control) == sum(part.control_sizes)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [small_vae, small_operators])
def test_other_precisions_train(make, precision):
    trainer = make(None, max_epochs=6, machine=Machine(accelerator="cpu", precision=precision))
    history = trainer.fit()
    assert np.isfinite(history["train_loss"]).all()
    assert history["train_loss"].iloc[-1] < history["train_loss"][0]
    wanted = torch.float64 if precision == "64-true" else torch.float32
    assert {p.dtype for p in trainer.model.parameters()} == {wanted}


def test_one_process_pays_nothing_and_changes_nothing(monkeypatch):
    trainer = LineTrainer()
    monkeypatch.setattr(trainer.fabric, "all_reduce", None)
    trainer.fit()
    assert trainer.processes.first and trainer.status == "finished"


def test_half_precision_whose_gradients_overflow_by_design_is_refused():
    with pytest.raises(ModelError, match="'16-mixed'.*bf16-mixed"):
        Machine(precision="16-mixed")

"""The benchmarks run, their rows are complete, and what they compare agrees in value; no timing is tested."""

from __future__ import annotations

import json
import runpy
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import energy, explorer, gpu, measure, operators, record, scale, vae
from benchmarks.gpu import Card
from benchmarks.measure import Counts, counts, interleaved
from cellop_nb.__main__ import main
from cellop_nb.commands import tools
from cellop_nb.errors import DataError
from cellop_nb.models.energy import self_distance


@pytest.fixture
def problem():
    """The small problem in double precision, where the products in cdist lose nothing that matters."""
    p = operators.problem(**operators.TINY)
    for name in ("x", "library", "latents", "target", "target_self"):
        setattr(p, name, getattr(p, name).double())
    p.vae.double()
    p.model.double()
    parts = vars(p.design).values()  # indices stay whole numbers
    p.design = type(p.design)(*(part.double() if part.is_floating_point() else part for part in parts))
    p.target_self = self_distance(p.target, p.sizes)
    with torch.no_grad():
        p.latents = p.vae.encode(p.x, p.library).loc
    return p


def gradients(p, name):
    p.model.zero_grad()
    p.vae.zero_grad()
    loss = operators.LOSSES[name](p)
    loss.backward()
    found = {key: value.grad for key, value in p.model.named_parameters() if value.grad is not None}
    return loss.detach(), found


def test_the_forms_of_the_operator_step_agree(problem):
    value, found = gradients(problem, operators.OURS)
    assert any(grad.abs().max() > 0 for grad in found.values())
    for name in (operators.BEFORE, operators.FIX, operators.BATCHED):
        other, theirs = gradients(problem, name)
        torch.testing.assert_close(other, value, rtol=1e-7, atol=1e-9)
        for key, grad in found.items():
            torch.testing.assert_close(theirs[key], grad, rtol=1e-5, atol=1e-8, msg=key)


def test_only_the_old_form_sends_gradients_to_the_frozen_encoder(problem):
    for name in operators.LOSSES:
        gradients(problem, name)
        reached = any(parameter.grad is not None for parameter in problem.vae.encoder.parameters())
        assert reached == (name == operators.BEFORE)


def test_steps_of_the_forms_lead_to_the_same_operators():
    models = {}
    for name in operators.LOSSES:
        p = operators.problem(**operators.TINY)
        step = operators.stepper(name, p)
        losses = [float(step()) for _ in range(3)]
        assert losses[2] < losses[0]
        models[name] = p.model.axis_shift.detach()
    for name in (operators.BEFORE, operators.FIX, operators.BATCHED):
        torch.testing.assert_close(models[name], models[operators.OURS], rtol=1e-2, atol=1e-4)


def test_the_screen_has_the_wanted_share_of_nonzeros():
    adata = vae.screen(1_000, 500)
    assert adata.X.nnz / (1_000 * 500) == pytest.approx(0.10, abs=0.01)
    assert np.array_equal(vae.screen(1_000, 500).X.indices, adata.X.indices)
    assert (adata.obs["split"] == "val").mean() == pytest.approx(0.1)


def test_dense_and_grouped_energy_agree():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 5, generator=generator).double() for _ in range(2))
    torch.testing.assert_close(energy.dense(x, y), energy.energy_distance(x, y))


def test_the_guard_is_back_after_timing_and_its_bound_is_its_traffic(monkeypatch):
    monkeypatch.setattr(measure, "bandwidth", lambda: 1.0)
    trainer = operators.latent_trainer(operators.TINY, 4)
    guard = trainer.guard
    row = measure.guard_share(trainer, 3)
    assert trainer.guard is guard
    assert trainer.step == 9
    assert row["share"] == pytest.approx(row["guard_seconds"] / row["cpu_seconds"])
    states = [torch.get_rng_state(), trainer.generator.get_state(), trainer.cpu_generator.get_state()]
    assert row["bound"] == "memory" and row["bound_seconds"] == 2 * sum(state.nbytes for state in states)
    assert row["distance"] == pytest.approx(row["guard_seconds"] / row["bound_seconds"])
    assert row["calls"] > 0 and row["mbyte"] > 0, "its calls are counted apart from the step's"
    assert row["calls"] < counts(lambda: trainer._run_step(trainer.batch)).calls


def test_the_live_picture_is_compared_with_drawing_it_again():
    row = measure.live_share(operators.latent_trainer, operators.TINY, 4)
    assert row["bound"] == "drawing" and row["bound_seconds"] > 0
    assert row["distance"] == pytest.approx(row["seconds"] / row["bound_seconds"])
    assert ("between" in row) == (row["distance"] > 2)


def test_a_move_of_the_explorer_is_compared_with_products_and_drawing(monkeypatch):
    monkeypatch.setattr(explorer, "product_rate", lambda *shape: 1e12)
    monkeypatch.setattr(explorer, "cpu_seconds", lambda call: (call(), 0.25)[1])
    cells, sheet = explorer._cells(40, 20), explorer.ExplorerPicture()
    name = "a perturbation for the first time"
    row = explorer._compared(cells, sheet, name, explorer.MOVES[name], 10.0)
    assert row["bound"] == "drawing, products" and row["between"].endswith(explorer.FIRST)
    assert row["bound_seconds"] == pytest.approx(0.25 + row["gflop"] / 1e3, abs=1e-9) and row["gflop"] > 0
    assert row["drawing_share"] == pytest.approx(0.025)


def test_what_is_counted_at_fewer_cells_grows_with_the_pairs(monkeypatch):
    taken = {"seconds": 9.0, "cpu_seconds": 9.0, "extra_mb": 1.0}
    monkeypatch.setattr(energy, "in_fresh_process", lambda *a, **k: dict(taken))
    monkeypatch.setattr(energy, "product_seconds", lambda n: {1_000: 3.0}[n])
    row = energy._large(1_000, 100, Counts(calls=7, bytes=10**6))
    assert (row["calls"], row["mbyte"], row["distance"]) == (700, 100.0, 3.0)
    taken["note"] = "out of memory"
    assert "bound_seconds" not in energy._large(1_000, 100, Counts())


def test_a_call_is_measured_in_a_fresh_process():
    arguments = {"variant": "torch.cdist", "n": 40}
    row = measure.in_fresh_process("benchmarks.energy", "step", arguments)
    assert row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["extra_mb"] >= 0, row
    assert measure.in_fresh_process("benchmarks.energy", "no_such_step", {})["note"].startswith(
        "AttributeError"
    )


@pytest.mark.slow
@pytest.mark.parametrize("section", tools.SECTIONS)
def test_the_command_measures_and_writes(section, tmp_path, capsys, monkeypatch):
    """In this process: the one above starts another, which a section does up to twenty times."""

    def here(module, function, arguments, timeout=0.0):
        return measure.child(module, function, arguments)

    for module in (energy, operators, scale, vae):
        monkeypatch.setattr(module, "in_fresh_process", here)
    target = tmp_path / "bench.json"
    assert main(["bench", section, "--quick", "--threads", "1", "--out", str(target)]) == 0
    written = json.loads(target.read_text())
    assert {"date", "machine", "limits", "threads", "versions", "quick", "results"} <= set(written)
    assert record.read(target) == written
    assert (written["threads"], written["quick"]) == (1, True)
    rows = written["results"][section]
    assert {row["variant"] for row in rows} >= {"cellop_nb"}
    for row in rows:
        filled = {key for key in row if row[key] is not None}
        measured = {
            "seconds",
            "stage_seconds",
            "cells_per_s",
            "cells_per_cpu_s",
            "negative_elbo",
            "share",
            "time_exponent",
        } & filled
        assert measured or row["note"].startswith(("not installed", "left out")), row
    out = capsys.readouterr().out
    assert all(row["variant"] in out for row in rows)


def test_the_bound_is_the_larger_of_products_and_memory_and_far_figures_are_explained():
    made = Counts(calls=2_000, operations=3 * 10**9, bytes=10**6)
    near = measure.compared(1.5, products=1.0, memory=0.2, made=made, between="little")
    assert (near["bound_seconds"], near["bound"], near["distance"]) == (1.0, "products", 1.5)
    assert (near["calls"], near["gflop"], near["mbyte"]) == (2_000, 3.0, 1.0)
    assert "between" not in near
    drawn = measure.compared(9.0, products=1.0, drawing=4.0, made=made, between="little")
    assert (drawn["bound_seconds"], drawn["bound"]) == (
        5.0,
        "drawing, products",
    ) and "drawing_share" not in near
    assert Counts(3, 5, 7, ("item",)) + Counts(1, 1, 1) == Counts(4, 6, 8, ("item",))
    assert Counts(300, 500, 700).per(100) == Counts(3, 5, 7)
    far = measure.compared(9.0, products=1.0, memory=3.0, made=made, between="much")
    assert far["bound"] == "memory" and far["distance"] == 3
    assert far["between"].startswith("2,000 torch calls") and far["between"].endswith("; much")


def test_the_products_of_a_step_are_counted(monkeypatch):
    monkeypatch.setattr(operators, "product_rate", lambda *shape: 1.0)
    # 2 groups of 3 cells: 18 pairs across (distance and gradient), 9 within (half the distances, one gradient)
    assert operators.step_products(2, 3) == 2 * 9 * 2 * 34 * (2 + 1.5)
    monkeypatch.setattr(vae, "product_rate", lambda *shape: 1.0)
    assert vae.step_bounds(5, 4, 7)["products"] == 3 * 2 * 4 * 7 * (5 + vae.LATENT)
    assert vae.step_bounds(10, 4, 7)["memory"] > vae.step_bounds(5, 4, 7)["memory"]


def test_calls_products_and_bytes_are_counted_with_the_gradient():
    a, b = torch.ones(3, 4, requires_grad=True), torch.ones(4, 5)
    found = counts(lambda: (a @ b).sum().backward())
    assert found.operations == 2 * 2 * 3 * 4 * 5  # the product, and the gradient of a
    assert found.calls >= 4
    assert found.bytes >= 4 * 2 * (12 + 20 + 15)
    assert found.reads == ()
    assert counts(lambda: a.t()).calls == 0  # views are free
    assert counts(lambda: torch.zeros(3, 5).addmm_(a.detach(), b)).operations == 2 * 3 * 4 * 5
    assert counts(lambda: (bool(a.sum() > 0), a.tolist(), b.nonzero())).reads[0] == "_local_scalar_dense"
    assert found.times(3).operations == 3 * found.operations


def test_what_a_step_of_the_vae_asks_for_is_what_its_bound_counts():
    adata = vae.screen(300, 1_000)
    made = counts(vae.step(adata, 32, 64))
    dense = 3 * 2 * 64 * 1_000 * (32 + vae.LATENT)
    assert dense < made.operations < 1.2 * dense  # the small layers come on top


def test_the_machines_limits_are_positive():
    assert all(value > 0 for value in (measure.product_rate(16, 8, 16, 2), measure.call_seconds()))


def test_a_file_that_is_no_record_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("[1]")
    for path in (tmp_path / "other.json", tmp_path / "missing.json"):
        with pytest.raises(DataError, match="Expected a record of a benchmark"):
            record.read(path)


def test_the_sections_of_the_command_are_those_of_the_record():
    assert tools.SECTIONS == record.SECTIONS


def test_bench_refuses_what_it_could_not_do(capsys, tmp_path):
    for arguments in (["--threads", "0"], ["--out", str(tmp_path / "none" / "x.json")]):
        assert main(["bench", "energy", "--quick", *arguments]) == 2
        assert "To fix it" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_section_of_the_gpu_is_refused_without_one(capsys):
    assert main(["bench", "gpu", "--quick"]) == 2
    assert "a CUDA device" in capsys.readouterr().err


def test_the_section_of_the_gpu_measures_every_option_against_calls_one_by_one():
    """On a CPU in its place: nothing is recorded there, and no wait is counted."""
    rows = gpu.run(quick=True, device="cpu")
    assert [row["what"] for row in rows if row["variant"] == gpu.PLAIN] == ["operator step", "VAE step"]
    assert all(row["gain"] == 1 for row in rows if row["variant"] == gpu.PLAIN)
    assert all((row.get("seconds") or row["stage_seconds"]) > 0 and row.get("waits") is None for row in rows)
    for row in rows:
        if row.get("bound_seconds"):
            assert row["bound_share"] * row["distance"] == pytest.approx(1)
            assert (row["distance"] > 2) == ("between" in row)


def test_what_a_card_says_of_a_call():
    made = []
    card = Card("cpu")
    assert card.seconds(lambda: made.append(time.sleep(0.002)), least=0.004, turns=2) >= 0.002
    assert len(made) == 3 + 2 * 2
    assert card.product_rate(8, 4, 8, 2) > 0 and card.bandwidth(1) > 0 and card.name == "CPU"


def test_growth_is_told_as_exponent_and_bytes_per_cell():
    common = {"variant": "cellop_nb", "stage": "train", "file": "h5ad"}
    rows = [common | {"cells": n, "cells_per_cpu_s": n / (1e-6 * n**1.5), "extra_mb": 50 + 2e-4 * n}
            for n in (10_000, 30_000, 100_000)]  # fmt: skip
    (row,) = scale.growth([*rows, common | {"file": "zarr", "cells": 1, "note": "left out"}])
    assert row["time_exponent"] == pytest.approx(1.5) and row["bytes_per_cell"] == pytest.approx(200)
    assert "10,000 to 100,000" in row["what"]


def test_growth_says_what_is_held_of_every_cell():
    given = [("names", 100), ("read", 130), ("encode", 400), ("predict", 600)]
    common = {"variant": scale.OURS, "file": "h5ad", "cells_per_cpu_s": 1e3}
    rows = [common | {"stage": stage, "cells": n, "extra_mb": slope * n / 1e6}
            for stage, slope in given for n in (1_000, 9_000)]  # fmt: skip
    notes = {row["stage"]: row["note"] for row in scale.growth(rows)}
    assert notes == {
        "names": None,
        "read": "of these bytes 100 names and labels",
        "encode": "of these bytes 100 names and labels, 128 latents",
        "predict": "of these bytes 100 names and labels, 256 latents",
    }
    assert scale.growth(rows[2:4])[0]["note"] is None, "nothing is said where names were not measured"


def test_bounds_of_scale_come_from_the_same_run(monkeypatch):
    monkeypatch.setattr(scale, "product_rate", lambda *shape: 2.0 * 2_000 * 160)
    monkeypatch.setattr(scale, "step_bounds", lambda *sizes: {"products": 0.64})
    monkeypatch.setattr(scale, "bandwidth", lambda: 4e6)
    rate = {(scale.OURS, "names"): 900, (scale.OURS, "read"): 100, (scale.OURS, "train"): 10,
            (scale.WITHIN, "train"): 40, (scale.OURS, "encode"): 60, (scale.OURS, "predict"): 20,
            (scale.PEER, "train"): 4}  # fmt: skip
    rows = [scale._row(variant, stage, 800, 2_000, "h5ad", {"seconds": 1.0, "cpu_seconds": 800 / r, "extra_mb": 1.0})
            | {"file_mb": 16.0} for (variant, stage), r in rate.items()]  # fmt: skip
    found = {(row["variant"], row["stage"]): row for row in scale.bounded(rows)}
    train, encode = found[scale.OURS, "train"], found[scale.OURS, "encode"]
    assert (train["bound_seconds"], train["distance"]) == (20, 4) and "60.00 CPU s more" in train["between"]
    assert encode["bound_seconds"] == 8 + 1_000 and "between" not in encode  # two million non-zeros
    decoding = 2 * 800 / 16  # one cell per second
    assert found[scale.OURS, "predict"]["bound_seconds"] == 8 + decoding
    assert found[scale.OURS, "read"]["bound_seconds"] == 8  # read and written
    assert (
        found[scale.WITHIN, "train"]["bound_seconds"] == 2
        and "18.00" in found[scale.WITHIN, "train"]["between"]
    )
    for free in ((scale.OURS, "names"), (scale.PEER, "train")):
        assert "bound" not in found[free]


def test_short_calls_are_made_several_times_in_a_turn_and_long_ones_once(monkeypatch):
    clock, made = [0.0], {"short": 0, "long": 0}

    def call(name: str, seconds: float) -> None:
        made[name] += 1
        clock[0] += seconds

    for kind in ("process_time", "perf_counter"):
        monkeypatch.setattr(f"benchmarks.measure.time.{kind}", lambda: clock[0])
    found = interleaved(
        {"short": lambda: call("short", 0.0045), "long": lambda: call("long", 1.0)}, repeats=3
    )
    assert made == {"short": 2 + 3 * 5, "long": 1 + 3}
    assert found["short"] == pytest.approx({"seconds": 0.0045, "cpu_seconds": 0.0045})
    assert found["long"]["cpu_seconds"] == pytest.approx(1.0)


def test_the_record_that_is_shipped_is_a_full_one():
    made = record.read(record.SHIPPED)
    assert not made["quick"] and made["threads"] == 1 and made["versions"]["torch"]
    for section in ("energy", "operators", "vae", "predict", "scale"):
        variants = {row["variant"] for row in made["results"][section] if not row.get("note")}
        assert any(name.startswith("cellop_nb") for name in variants)
    assert {vae.PEER, "torch.cdist", operators.BEFORE} <= {
        row["variant"] for rows in made["results"].values() for row in rows if row.get("cpu_ratio")
    }
    assert any(row.get("time_exponent") for row in made["results"]["scale"])
    assert record.told(made)["sizes"] == "full"


def test_a_wheel_says_that_a_checkout_is_needed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("cellop_nb.commands.environment.ROOT", tmp_path)
    for command in (["bench", "energy"], ["docs"], ["test"]):
        assert main(command) == 2
        assert "Expected a checkout with a" in capsys.readouterr().err


def test_the_steps_that_are_counted_run():
    """One of each: `benchmarks/steps.py` speaks the package's present names."""
    steps = runpy.run_path(str(Path(record.__file__).with_name("steps.py")))["steps"]
    assert set(steps) == {"one VAE step", "one operator step", "predict", "smallest hold-out"}
    for name, step in steps.items():
        assert step() is not None or name.endswith("step")

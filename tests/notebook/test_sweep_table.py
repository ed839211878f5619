"""What a sweep found: the table, effects against naive references, intervals that cover, pictures of all forms."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cellop_nb.errors import LabelError
from cellop_nb.notebook import figures
from cellop_nb.notebook.sweeps import store
from cellop_nb.notebook.sweeps import table as t
from cellop_nb.notebook.sweeps.plan import Run

PLANTED = {8: 0.0, 16: -3.0, 32: -5.0}


def grid(rng, *, noise=1.0, n_seeds=5):
    """Runs with a planted effect of `width`, one of `depth`, and seeds that move everything."""
    rows = []
    for seed in range(n_seeds):
        luck = 10 * rng.normal()
        own = {width: noise * rng.normal() for width in PLANTED}
        for width, depth in itertools.product(PLANTED, (1, 2)):
            loss = 50 + PLANTED[width] + 4 * depth + luck + own[width] + 0.1 * rng.normal()
            rows.append({"run": f"r{len(rows)}", "width": width, "depth": depth, "seed": seed, "loss": loss})
    return pd.DataFrame(rows).assign(status="done", seconds=1.0, error="", notebook="")


VARIED = ["width", "depth", "seed"]


def test_effects_are_the_differences_inside_settings_and_seeds():
    found = t.effects(table := grid(np.random.default_rng(0)), VARIED, "loss").set_index(
        ["parameter", "value"]
    )
    for width in PLANTED:
        per_seed = []
        for seed in range(5):
            differences = []
            for depth in (1, 2):
                here = table[(table["seed"] == seed) & (table["depth"] == depth)].set_index("width")["loss"]
                differences.append(here[width] - sum(here[w] for w in PLANTED) / 3)
            per_seed.append(sum(differences) / 2)
        row = found.loc[("width", width)]
        low, high = stats.t.interval(0.95, 4, loc=np.mean(per_seed), scale=stats.sem(per_seed))
        assert [row["effect"], row["low"], row["high"]] == pytest.approx([np.mean(per_seed), low, high])
        assert (row["seeds"], row["runs"]) == (5, 10)


def test_intervals_cover_the_planted_effect_as_often_as_they_say():
    rng = np.random.default_rng(1)
    truth = {width: value - np.mean(list(PLANTED.values())) for width, value in PLANTED.items()}
    inside = []
    for _ in range(200):
        found = t.effects(grid(rng), VARIED, "loss").query("parameter == 'width'")
        inside += [row.low <= truth[row.value] <= row.high for row in found.itertuples()]
    assert 0.92 < np.mean(inside) < 0.98


def test_a_failed_run_does_not_tilt_the_comparison():
    table = grid(np.random.default_rng(2), noise=0.0)
    table.loc[(table["width"] == 8) & (table["seed"] == 0) & (table["depth"] == 1), "status"] = "failed"
    found = t.effects(table, VARIED, "loss").query("parameter == 'width'").set_index("value")["effect"]
    assert found[32] - found[8] == pytest.approx(-5.0, abs=0.2), (
        "whatever the luck of the seed that lacks one"
    )


def test_one_seed_gives_effects_without_an_interval():
    found = t.effects(grid(np.random.default_rng(0), n_seeds=1), ["width", "depth"], "loss")
    assert found["effect"].notna().all()
    assert found[["low", "high"]].isna().all(axis=None)


def test_a_random_sample_has_trends_but_no_effects():
    rng = np.random.default_rng(3)
    table = pd.DataFrame({"rate": rng.uniform(size=40), "width": rng.integers(1, 4, 40), "status": "done"})
    table["loss"] = -table["rate"] + 0.1 * rng.normal(size=40)
    assert t.effects(table, ["rate"], "loss").empty
    found = t.trends(table, ["rate", "width", "seed"], "loss").set_index("parameter")
    assert found.loc["rate", "spearman"] == pytest.approx(stats.spearmanr(table["rate"], table["loss"])[0])
    assert found.loc["rate", "high"] < 0 < found.loc["width", "high"]
    assert found.loc["width", "low"] < 0


def test_the_best_setting_is_not_one_lucky_seed():
    table = grid(np.random.default_rng(4))
    lucky = (
        (table["width"] == 8)
        & (table["depth"] == 1)
        & (table["seed"] == table.loc[table["loss"].idxmin(), "seed"])
    )
    table.loc[lucky, "loss"] = table["loss"].min() - 0.5
    assert t.best_runs(table, "loss", "min", n=1)["width"].item() == 8
    best = t.best_settings(table, VARIED, "loss", "min", n=1)
    assert best[["width", "depth", "runs"]].values.tolist() == [[32, 1, 5]]
    assert t.best_runs(table, "loss", "max", n=1)["depth"].item() == 2


def finished(folder, key, values, status="done", **metrics):
    error = "" if status == "done" else "ValueError: unlucky"
    result = {"status": status, "error": error, "seconds": 2.0, "values": values, "metrics": metrics}
    work = store.draft(folder, key)
    (work / "90_mine.ipynb").touch()
    assert store.finish(work, folder / key, result)


def test_the_table_has_a_row_for_every_planned_run(tmp_path):
    values = {
        "b": {"width": 2, "keys": ["x"], "layer": None},
        "a": {"width": 1, "keys": ["x", "y"], "layer": None},
        "c": {"width": 3, "keys": ["x"], "layer": None},
    }
    metrics = {"loss": 1.5, "deep": {"er": 2}, "width": 9, "name": "text", "yes": True}
    finished(tmp_path, "a", values["a"], **metrics, parameters={"width": 1}, inputs={"n": 1})
    finished(tmp_path, "b", values["b"], "failed")
    table = t.collect(tmp_path, [Run(values[key], key) for key in "bac"], "90_mine")
    assert table["run"].tolist() == ["b", "a", "c"]
    assert table["status"].tolist() == ["failed", "done", "missing"]
    row = table.set_index("run").loc["a"]
    assert row[["keys", "layer", "loss", "deep.er", "metric.width"]].tolist() == [
        "x,y",
        "none",
        1.5,
        2.0,
        9.0,
    ]
    assert {"name", "yes", "parameters", "inputs.n"}.isdisjoint(table.columns)
    assert table["notebook"].tolist() == ["b/90_mine.ipynb", "a/90_mine.ipynb", ""]
    assert t.parameters_of(table, ["width", "keys", "layer"]) == ["width", "keys"]
    assert t.metric_of(table, ["width", "keys", "layer"]) == "loss"
    with pytest.raises(LabelError, match="did you mean 'loss'"):
        t.metric_of(table, ["width", "keys", "layer"], "los")


def test_low_is_good_unless_the_name_says_otherwise():
    assert t.direction_of("test_loss") == "min"
    assert t.direction_of("pearson_delta") == "max"
    assert t.direction_of("test_loss", "max") == "max"


def test_a_draft_counts_for_nothing_and_the_first_of_two_workers_wins(tmp_path):
    work = store.draft(tmp_path, "a")
    (work / "half.csv").write_text("1,2")
    assert t.collect(tmp_path, [Run({"width": 1}, "a")], "90_mine")["status"].tolist() == ["missing"]
    finished(tmp_path, "a", {"width": 1}, loss=1.0)
    assert not store.finish(work, tmp_path / "a", {"status": "done", "values": {}, "metrics": {"loss": 2.0}})
    assert store.result_of(tmp_path / "a")["metrics"] == {"loss": 1.0}
    store.draft(tmp_path, "b")
    store.sweep_up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failed_run_is_replaced_by_its_repetition(tmp_path):
    finished(tmp_path, "a", {"width": 1}, "failed")
    finished(tmp_path, "a", {"width": 1}, loss=1.0)
    assert store.result_of(tmp_path / "a")["status"] == "done"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def texts(fig):
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def test_the_picture_follows_the_number_of_parameters():
    table = grid(np.random.default_rng(5))
    one = figures.sweep_map(table, ["width", "seed"], "loss")
    assert one.axes[0].get_xlabel() == "width"
    two = figures.sweep_map(table, VARIED, "loss")
    means = table.groupby(["depth", "width"])["loss"].mean()
    assert {f"{value:.4g}" for value in means} == set(texts(two))
    frame = two.axes[0].lines[-1].get_xydata()[0]
    assert frame.tolist() == [2, 0], "width 32, depth 1"
    many = figures.sweep_map(table.assign(rate=np.geomspace(1e-4, 1, len(table))), [*VARIED, "rate"], "loss")
    assert len(many.axes[0].lines) == len(table) + 4
    assert {"8", "16", "32", "1e-4", "1"} <= set(texts(many))
    effect = figures.sweep_effects(t.effects(table, VARIED, "loss"), "loss")
    assert [ax.get_xlabel() for ax in effect.axes] == ["width", "depth"]
    assert all(figures.png(fig).startswith(b"\x89PNG") for fig in (one, two, many, effect))

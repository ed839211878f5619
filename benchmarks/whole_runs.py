"""Large screens through the shell, whole: `python -m benchmarks.whole_runs many|wide|challenge --folder DIR`.

`many` is `run` on 2,000 perturbations x 30 cells x 1,000 genes in two contexts, `wide` on 62,000 cells x 14,000 genes.
`challenge` fits a model, then predicts 300 perturbations x 3 contexts that have only controls x 400 cells x 18,000 genes.
CPU seconds and memory are those of all processes, memory that they share counted once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil

import cellop_nb as co
from benchmarks.scale import write_screen
from cellop_nb.commands.terminal import say

N_ASKED, N_CELLS = 300, 400


def many(path: Path, scale: float) -> None:
    """Two thousand perturbations with planted effects, 30 cells of each."""
    n = max(4, int(2000 * scale))
    adata = co.datasets.synthetic(
        n_contexts=2, n_perturbations=n, n_cells=30, n_controls=500, n_genes=1000, n_latent=12
    )
    adata.write_h5ad(path)


def wide(path: Path, scale: float) -> None:
    """Few perturbations, many cells and all genes."""
    write_screen(path, int(62_000 * scale), 14_000, nonzero=0.07)


def challenge(path: Path, scale: float) -> None:
    """300 perturbations in two contexts, and three contexts with controls alone."""
    write_screen(
        path, int(40_000 * scale), 18_000, contexts=5, perturbations=N_ASKED + 1, measured=2, controls=0.2
    )


def measured(command: list[str], folder: Path) -> dict[str, float]:
    """Run it, and look at its processes five times a second: ``seconds, cpu_seconds, peak_mb``."""
    start, cpu, peak = time.monotonic(), {}, 0.0
    with psutil.Popen(command, cwd=folder) as process:
        while process.poll() is None:
            memory = 0
            for one in [process, *process.children(recursive=True)]:
                try:
                    spent = one.cpu_times()
                    cpu[one.pid] = spent.user + spent.system
                    memory += one.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                    continue
            peak = max(peak, memory / 1e6)
            time.sleep(0.2)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"seconds": time.monotonic() - start, "cpu_seconds": sum(cpu.values()), "peak_mb": peak}


def cells_of(folder: Path, n: int = 12) -> pd.DataFrame:
    """The slowest cells of the notebooks in a run folder: ``notebook, cell, seconds``."""
    rows = []
    for path in sorted(folder.glob("*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            seconds = cell["metadata"].get("papermill", {}).get("duration")
            rows.append((path.stem, number, seconds or 0.0))
    table = pd.DataFrame(rows, columns=["notebook", "cell", "seconds"])
    return table.nlargest(n, "seconds").round(1)


def main(words: list[str] | None = None) -> int:
    """Write the screen where it is missing, run, and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("screen", choices=("many", "wide", "challenge"))
    parser.add_argument("--folder", type=Path, required=True, help="for the screen and what comes of it")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the size")
    parser.add_argument("--only", help="notebooks, as of `run`")
    args = parser.parse_args(words)
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{args.screen}_{args.scale:g}.h5ad"
    if not path.exists():
        {"many": many, "wide": wide, "challenge": challenge}[args.screen](path, args.scale)
    shell = [sys.executable, "-m", "cellop_nb"]
    if args.screen != "challenge":
        name = time.strftime(f"{args.screen}_%H-%M-%S")
        where = ["--runs", str(folder), "--name", name]
        only = ["--only", args.only] if args.only else []
        say(json.dumps(measured([*shell, "run", "--data", str(path), *where, *only], folder)))
        say(cells_of(folder / name).to_string(index=False))
        return 0
    model, asked, out = folder / "model.safetensors", folder / "conditions.csv", folder / "virtual.h5ad"
    question = ["--context", "type 2", "--perturbation", "drug 1"]
    if not model.exists():
        fit = [*shell, "predict", "--data", str(path), *question, "--save-model", str(model)]
        say(f"fit: {json.dumps(measured(fit, folder))}")
    pairs = [(f"type {c}", f"drug {p}") for c in (2, 3, 4) for p in range(1, int(N_ASKED * args.scale) + 1)]
    table = pd.DataFrame(pairs, columns=["context", "perturbation"]).assign(n_cells=N_CELLS)
    table.to_csv(asked, index=False)
    ask = [*shell, "predict", str(asked), "--model", str(model), "--data", str(path), "--out", str(out)]
    say(f"predict: {json.dumps(measured(ask, folder))}, {os.path.getsize(out) / 1e9:.2f} GB written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

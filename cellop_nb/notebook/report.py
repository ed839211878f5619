"""`report.html`: what a fitted `CellOp` says of a screen, on one page that can be sent to a colleague."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError, StorageError, counted
from ..files import write_whole

if TYPE_CHECKING:  # the command line fills in the notebooks of a run without torch and matplotlib
    import pandas as pd

    from ..analysis.cellop import CellOp
    from ..analysis.holdout import Holdout

__all__ = ["report"]

MOST, N_FIGURES, N_GENES = 12, 3, 5
_RULES = ("mean shift", "near mean shift", "linear")
_MARK = '<meta name="generator" content="cellop_nb report">'
_BEGIN, _END = "<!-- notebooks -->", "<!-- end of notebooks -->"
_CSS = """
body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:60rem;margin:0 auto;padding:1rem 1.5rem}
h1{font-size:1.7rem;line-height:1.2}h2{font-size:1.2rem;margin-top:2rem;border-bottom:1px solid #ddd}
h3{font-size:1rem;margin-bottom:.2rem}p,li{max-width:46rem;overflow-wrap:anywhere}table{font-size:.9rem;margin:.5rem 0}
.wide{overflow-x:auto}img{max-width:100%;height:auto}.quiet{color:#5c5c5c;font-size:.9rem}.genes{margin:0 0 .8rem}
"""
_WORDS = (
    "Energy distances are Euclidean, U-statistic, in principal components of log expression: 0 where two clouds of cells "
    "are the same, up to noise. Changes of genes are of mean log1p counts per 10,000. Intervals hold what predictions of "
    "measured contexts missed (95 %). Mean shift: the mean change in the other contexts. Near mean shift: near contexts "
    "count more. Linear: a ridge regression over contexts. Latent shift: one shift for all cells in the latent space. "
    "Affine operator: a matrix and a shift there."
)


def report(model: CellOp, holdout: Holdout | None = None, *, out: str | Path | None = None) -> Path:
    """Write what a model says of its screen as one HTML page: verdicts, leading genes, what is unknown, what to do next.

    The page is made of what `model.verdict`, `intervals`, `support`, `choice` and the hold-out say; nothing is fitted. It
    stands alone: pictures are inside, and nothing is loaded from elsewhere.

    Parameters
    ----------
    model
        A fitted :class:`CellOp`.
    holdout
        What :func:`cellop_nb.holdout` gave, so that predictions stand beside the real cells.
    out
        File to write; ``report.html`` in the current folder where None. An earlier report is replaced, another file is
        not. Executed notebooks in the same folder are linked, with their answers.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ModelError
        Where the model was not fitted.
    StorageError
        Where `out` is a file that is no report, or the disk refuses.
    """
    if not model.members:
        raise ModelError("a fitted CellOp", "one that was not fitted", "call model.fit() first")
    path = Path("report.html" if out is None else out)
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")[:500]:
        raise StorageError("a new file, or an earlier report", f"{path}", "name another file")
    scored = _scored(holdout)
    questions, n_questions = _questions(model, scored)
    sections = [
        _measured(model),
        _verdicts(model, questions, n_questions, scored),
        _figures(model, holdout, questions),
        _unknown(model, questions),
        _next(model, questions, holdout),
        f'<section>{_BEGIN}{_notebooks(path.parent)}{_END}</section><p class="quiet">{escape(_WORDS)}</p>',
    ]
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{_MARK}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Report of a perturbation screen</title><style>{_CSS}</style></head><body>"
        f"<h1>What would the perturbations do?</h1>{''.join(sections)}</body></html>\n"
    )
    return write_whole(path, lambda part: part.write_text(page, encoding="utf-8"))


def link_notebooks(path: Path) -> None:
    """Bring the links of a report in step with the notebooks that lie beside it."""
    head, _, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    page = f"{head}{_BEGIN}{_notebooks(path.parent)}{_END}{tail}"
    write_whole(path, lambda part: part.write_text(page, encoding="utf-8"))


def _section(title: str, *blocks: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(blocks)}</section>"


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _ends(names: Sequence, most: int = MOST) -> list:
    """Of a ranking, strongest first: all, or two thirds of `most` from the top and the rest from the bottom."""
    weak = most // 3
    return list(names) if len(names) <= most else [*names[: most - weak], *names[len(names) - weak :]]


# -- what there is to say


def _scored(holdout: Holdout | None) -> pd.DataFrame | None:
    """Energy distance of each method, a row per (context, perturbation), mean over seeds."""
    if holdout is None or "e_distance" not in set(holdout.scores["metric"]):
        return None
    rows = holdout.scores[holdout.scores["metric"] == "e_distance"]
    return rows.pivot_table("value", ["context", "perturbation"], "method", sort=False, observed=True)


def _questions(model: CellOp, scored: pd.DataFrame | None) -> tuple[list[tuple[str, str]], int]:
    """Groups that get a verdict, strongest first, and how many there are: those not measured, or held out, else all."""
    from ..data.groups import controls_by_context

    sizes = model.effects.groupby("perturbation", observed=True)["e_distance"].mean()
    measured = set(zip(model.effects["context"], model.effects["perturbation"], strict=True))
    every = list(product(controls_by_context(model.adata, model.keys), sizes.index))
    held_out = set() if scored is None else set(scored.index)
    unmeasured = [pair for pair in every if pair not in measured or pair in held_out]
    ranked = sorted(unmeasured or every, key=lambda pair: (-sizes.fillna(0)[pair[1]], pair[0]))
    return _ends(ranked), len(ranked)


def _measured(model: CellOp) -> str:
    from ..display import styled

    effects, keys = model.effects, model.keys
    different = int(effects["different"].sum())
    facts = (
        f"{effects['n_perturbed'].sum():,.0f} perturbed cells in {counted(len(effects), 'group')}: "
        f"{counted(effects['perturbation'].nunique(), 'perturbation')} in "
        f"{counted(effects['context'].nunique(), 'context')}; "
        f"{len(model.genes):,} genes are modelled. Controls are the cells labelled {keys.control!r}."
    )
    test = (
        f"Different from their controls: {different} of {counted(len(effects), 'group')} (permutation test of the energy "
        f"distance, adjusted p below 0.05)."
    )
    ranked = effects.sort_values("e_distance", ascending=False, kind="stable")
    shown = ranked.loc[_ends(list(ranked.index))]
    columns = {
        "group": "group",
        "n_perturbed": "cells",
        "e_distance": "distance to controls",
        "detectable": "smallest to be seen",
        "different": "differs",
    }
    named = shown[[*columns]].rename(columns=columns)
    named = named.assign(differs=named["differs"].map({True: "yes", False: "no"}))
    more = f"The strongest and the weakest of {len(effects)} groups." if len(shown) < len(effects) else ""
    table = f'<p>{more}</p><div class="wide">{styled(named, precision=2, index=False).to_html()}</div>'
    return _section("What was measured", _list([facts, test]), table)


def _verdicts(model: CellOp, questions, n_questions: int, scored: pd.DataFrame | None) -> str:
    acts = model.effects.groupby("perturbation", observed=True)["different"].any()
    inert = set(acts.index[~acts.astype(bool)])
    blocks = []
    if len(questions) < n_questions:
        rest = "model.verdict(context, perturbation) has the others."
        blocks.append(f"<p>The strongest and the weakest of {n_questions} questions; {rest}</p>")
    for context, perturbation in questions:
        checked = "" if scored is None else _checked(scored, context, perturbation)
        text = f"{escape(model.verdict(context, perturbation))} <strong>{escape(checked)}</strong>"
        genes = "" if perturbation in inert else _genes(model, context, perturbation)
        blocks.append(f'<p>{text}</p><p class="quiet genes">{escape(genes)}</p>')
    blocks.append(f'<p class="quiet">{escape(str(model.choice))}</p>')
    return _section("What is predicted, and how far to trust it", *blocks)


def _checked(scored: pd.DataFrame, context: str, perturbation: str) -> str:
    """How far the prediction came, beside the best simple rule, where its real cells were held out."""
    if (context, perturbation) not in scored.index:
        return ""
    import pandas as pd

    energy = scored.loc[(context, perturbation)]
    start, ours = energy["no change"], energy["CellOp"]
    rules = energy[[name for name in _RULES if name in energy]].dropna()
    if not len(rules) or pd.isna(start) or pd.isna(ours):
        return ""
    explains = f"explains {100 * (1 - ours / start):.0f} % of the change"
    explains = "is no nearer than untreated cells" if ours >= start else explains
    numbers = f"energy distance {ours:.2f}; {rules.idxmin()} {rules.min():.2f}, no change {start:.2f}"
    return f"Checked against the real cells, which no fit had seen, it {explains} ({numbers})."


def _genes(model: CellOp, context: str, perturbation: str) -> str:
    rows = model.intervals(context, perturbation).head(N_GENES).itertuples()
    with_interval = "{0.gene} {0.change:+.2f} ({0.low:+.2f} to {0.high:+.2f})"
    named = [(with_interval if r.low == r.low else "{0.gene} {0.change:+.2f}").format(r) for r in rows]
    return f"Leading genes, with the change of mean log expression (95 % interval): {', '.join(named)}"


def _figures(model: CellOp, holdout: Holdout | None, questions) -> str:
    import pandas as pd

    from . import pl, style

    pictures = []
    if holdout is not None:
        methods = [name for name in ("no change", *_RULES, "CellOp") if name in set(holdout.scores["method"])]
        pictures.append(style.figure_of(pl.energy_bars(holdout.scores, methods=methods)))
    leading = []
    for context, perturbation in questions[:N_FIGURES]:
        genes = model.intervals(context, perturbation).head(N_GENES * 2)
        half = (genes["high"] - genes["low"]) / 2
        named = genes.assign(axis=f"{perturbation} in {context}", effect=genes["change"], uncertainty=half)
        leading.append(named)
    unit = "change of mean log expression"
    pictures.append(pl.response_axes(pd.concat(leading), n_top=10, unit=unit))
    return _section("In pictures", *map(_picture, pictures))


def _picture(figure) -> str:
    from . import style

    data = b64encode(style.png(figure)).decode("ascii")
    size, alt = round(float(figure.get_figwidth()) * style.DPI), escape(style.described(figure))
    return f'<p><img width="{size}" src="data:image/png;base64,{data}" alt="{alt}"></p>'


def _unknown(model: CellOp, questions) -> str:
    unmeasured = [pair for pair in questions if not model.plan(*pair).measured]
    doubtful = [model.verdict(*pair) for pair in unmeasured if not model.explained(*pair).max() > 0]
    own = "The response of a gene in one context alone cannot be told from the others, and no interval covers it."
    return _section("What cannot be known, and why", _list([*doubtful, own]))


def _next(model: CellOp, questions, holdout: Holdout | None) -> str:
    """What to measure or to change, each from a number of the tables."""
    advice = []
    effects = model.effects
    contexts = effects.groupby("perturbation", observed=True)["context"].nunique()
    single = [str(name) for name in contexts.index[contexts < 2]]
    if single:
        advice.append(f"Measure in a second context, so that predictions can be checked: {_some(single)}.")
    weak = effects.loc[~effects["different"].astype(bool), "group"]
    if len(weak):
        text = "These groups do not differ from their controls; measure more cells to be sure"
        advice.append(f"{text}: {_some(list(weak))}.")
    supports = {f"{label} in {context}": model.support(context, label) for context, label in questions}
    far = [name for name, table in supports.items() if len(table) and table["distance"].iloc[0] > 2]
    if far:
        advice.append(f"Measure a more similar context; the nearest one is unusually far: {_some(far)}.")
    larger = [name for name, table in supports.items() if table.attrs.get("extrapolated")]
    if larger:
        advice.append(
            f"Check the size with a few cells; it is larger than any measured one: {_some(larger)}."
        )
    lost = [] if holdout is None else holdout.behind().itertuples()
    behind = [f"{row.group} ({row.best_baseline})" for row in lost]
    if behind:
        advice.append(f"Use the simpler method where it came nearer to the real cells: {_some(behind)}.")
    advice = advice or ["Nothing: no number here asks for a change."]
    return _section("What to measure or change next", _list(advice))


def _some(names: Sequence[str], most: int = 6) -> str:
    return "; ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _notebooks(folder: Path) -> str:
    """The executed notebooks of a folder as links, each with the answer it ended with."""
    rows = []
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        try:
            numbers = json.loads((folder / path.stem / "metrics.json").read_text(encoding="utf-8"))
            answer = numbers.get("answer", "")
        except (OSError, ValueError):
            answer = ""
        text = escape(" ".join(str(answer).replace("**", "").split()))
        rows.append(f'<li><a href="{escape(path.name)}">{escape(path.stem)}</a>: {text or "no answer"}</li>')
    return f"<h2>The notebooks</h2><ul>{''.join(rows)}</ul>" if rows else ""

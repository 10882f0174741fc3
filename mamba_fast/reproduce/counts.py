"""Parameter counts of the paper's models, by the published shapes on the meta device: no weights are made.

Paper: tables 9 and 10 (24 layers of a Transformer are 48 blocks, d_model 1024, appendix E.2), table 11.
"""

from mamba_fast.config import MambaConfig
from mamba_fast.model import MambaLMHeadModel
from mamba_fast.reproduce import report
from mamba_fast.reproduce.partly import ALL, partly_selective_model
from mamba_fast.train import load_config

TITLE = "Parameter counts of tables 9 and 10"
LAYERS = 48
VOCABULARY = 50257  # of the GPT-2 tokenizer, padded to 50264
TABLE_9 = {None: 358.9, 1: 359.1, 2: 359.3, 4: 359.7, 8: 360.5, 16: 362.1, 32: 365.2, 64: 371.5}
TABLE_10 = {1: 367.1, 2: 367.4, 4: 368.0, 8: 369.1, 16: 371.5}
TASKS = {"induction": ("11", "induction heads", "74K"), "copying": ("1", "selective copying", None)}


def run(options):
    """Rows {"table", "model", "parameters", "ours", "paper"}; "ours" is rounded as the paper rounds."""
    rows = []
    for rank, paper in TABLE_9.items():
        selective = ALL if rank else ("B", "C")
        count = size(ablation(selective, dt_rank=rank or 64, d_state=16), LAYERS)
        what = f"Δ of rank {rank}" if rank else "Δ constant"
        rows.append(row("9", what, count, f"{paper:.1f}M", dt_rank=rank))
    for d_state, paper in TABLE_10.items():
        for kind, selective in (("selective", ALL), ("constant", ("delta",))):
            count, what = size(ablation(selective, 64, d_state), LAYERS), f"N = {d_state}, B and C {kind}"
            rows.append(row("10", what, count, f"{paper:.1f}M", d_state=d_state))
    for task, (table, what, paper) in TASKS.items():
        config = MambaConfig(**{"vocab_size": 16} | load_config(task).model)
        rows.append(row(table, what, size(MambaLMHeadModel(config, device="meta")), paper))
    compared = [r for r in rows if r["paper"]]
    same = sum(r["ours"] == r["paper"] for r in compared)
    yield {
        "findings": [f"{same} of {len(compared)} counts are the paper's, as it rounds them"],
        "rows": rows,
    }


def ablation(selective, dt_rank, d_state, n_layer=1):
    """A model of tables 9 and 10 without memory, of one of its 48 blocks."""
    options = {"dt_rank": dt_rank, "d_state": d_state}
    config = MambaConfig(d_model=1024, n_layer=n_layer, vocab_size=VOCABULARY, ssm_cfg=options)
    return partly_selective_model(config, selective, device="meta")


def size(model, layers=None):
    """Parameters of a model; with `layers`, of one that has so many layers like its first."""
    more = 0 if layers is None else layers - len(model.backbone.layers)
    return _count(model) + more * _count(model.backbone.layers[0])


def _count(module):
    return sum(p.numel() for p in module.parameters())


def row(table, what, count, paper, **sizes):
    ours = f"{count / 1e6:.1f}M" if count > 1e6 else f"{count / 1e3:.0f}K"
    return {"table": table, "model": what, "parameters": count, "ours": ours, "paper": paper} | sizes


def figure(plt, result):
    """Counts over the rank of Δ and over N: the paper's as rings, ours as dots inside."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for ax, table, size, label in (
        (axes[0], "9", "dt_rank", "rank of Δ (0: constant)"),
        (axes[1], "10", "d_state", "N"),
    ):
        rows = [r for r in result["rows"] if r["table"] == table]
        places = [r[size] or 0 for r in rows]
        ax.plot(places, [float(r["paper"][:-1]) for r in rows], "o", ms=11, mfc="none", color=report.PAPER,
                label="paper")  # fmt: skip
        ax.plot(places, [r["parameters"] / 1e6 for r in rows], "o", ms=5, color=report.OURS, label="ours")
        ax.set(xlabel=label, title=f"table {table}")
    axes[0].set(ylabel="parameters (millions)")
    axes[0].legend()
    return fig

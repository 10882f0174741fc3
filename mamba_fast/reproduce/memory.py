"""Peak memory of a training step of the 125M model over batch size, beside the paper's table.

Paper: appendix E.5: length 2048, one A100 80GB, a Transformer with FlashAttention-2 and torch.compile. Ours
is the 130m shape: parameters, gradients and AdamW's states in float32, the step under bfloat16 autocast.
"""

import torch

from mamba_fast.bench.model import Fused, Plain, new_model, tokens_of
from mamba_fast.bench.timing import peak_bytes
from mamba_fast.reproduce import report

TITLE = "Peak memory of a training step, 125M"
SEQLEN = 2048
PAPER = {  # GB by batch: Transformer, Mamba
    1: (4.6, 4.8), 2: (5.2, 5.8), 4: (6.9, 7.3), 8: (11.5, 12.3), 16: (20.7, 23.1), 32: (34.5, 38.2),
}  # fmt: skip
COLUMNS = {
    "ours": (report.OURS, "ours"),
    "ours, all logits": (report.OTHERS[3], "ours, all logits in memory"),
    "paper, Mamba": (report.PAPER, "paper: Mamba"),
    "paper, Transformer": (report.OTHERS[1], "paper: Transformer"),
}


def run(options):
    """Rows {"batch", "ours", "ours, all logits", "paper, Mamba", "paper, Transformer"} in GB (1e9 bytes)."""
    device = options.device
    if device.type != "cuda":
        raise SystemExit(f"memory: needs an NVIDIA GPU, got device {device.type!r}")
    torch.manual_seed(0)
    model = new_model("130m", device, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    rows = []
    for batch, (transformer, mamba) in PAPER.items():
        row, ids = {"batch": batch}, tokens_of((batch, SEQLEN), device, 0)
        for name, module in (("ours", Fused(model)), ("ours, all logits", Plain(model))):
            row[name] = round(
                peak_bytes(lambda module=module, ids=ids: step(module, ids, optimizer)) / 1e9, 2
            )
            torch.cuda.empty_cache()
        rows.append(row | {"paper, Mamba": mamba, "paper, Transformer": transformer})
    yield {"findings": findings(rows), "rows": rows}


def step(module, ids, optimizer):
    """One step of training: forward, loss, backward, AdamW."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = module(ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def findings(rows):
    """Ours over the paper's at the largest batch, and what one more row takes."""
    last, before = rows[-1], rows[-2]
    ratio = last["ours"] / last["paper, Mamba"]
    lines = [f"batch {last['batch']}: {last['ours']:.1f} GB, {ratio:.2f}x the paper's Mamba"]
    for name in COLUMNS:
        slope = (last[name] - before[name]) / (last["batch"] - before["batch"])
        lines.append(f"{name}: {slope:.2f} GB a row, {1e9 * slope / SEQLEN / 1e3:.0f} KB a token")
    return lines


def figure(plt, result):
    """A line a column, over batch size."""
    fig, ax = plt.subplots(figsize=(8, 4))
    batches = [row["batch"] for row in result["rows"]]
    for name, (color, label) in COLUMNS.items():
        look = "o--" if name.startswith("paper") else "o-"
        ax.plot(batches, [row[name] for row in result["rows"]], look, color=color, label=label, ms=5)
    report.lengths_axis(ax, batches)
    ax.set(xlabel="batch size (rows of 2048 tokens)", ylabel="peak memory (GB)", ylim=(0, None))
    ax.legend()
    return fig

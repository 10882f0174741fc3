"""Pictures of the block: what is connected to what, what the convolution holds, where the parameters are."""

import numpy as np
from matplotlib.patches import FancyBboxPatch

from mamba_ref.plots import COLORS

# name: (x, y, text, does it look at other tokens)
BOXES = {
    "norm": (0.0, 1.0, "RMSNorm", False),
    "in_proj": (1.5, 1.0, "in_proj", False),
    "conv1d": (3.0, 1.0, "conv1d\n4 taps, SiLU", True),
    "x_proj": (4.5, 2.0, "x_proj\ndt_proj", False),
    "scan": (6.0, 1.0, "selective\nscan", True),
    "gate": (7.5, 1.0, "× SiLU(z)", False),
    "out_proj": (9.0, 1.0, "out_proj", False),
}
# from, to, quantities on the arrow, where their label stands
ARROWS = [
    ("norm", "in_proj", ("hidden_states",), (0.75, 0.48)),
    ("in_proj", "conv1d", ("x",), (2.15, 1.5)),
    ("conv1d", "scan", ("u",), (4.5, 0.8)),
    ("conv1d", "x_proj", (), None),
    ("x_proj", "scan", ("delta", "B", "C"), (5.7, 2.25)),
    ("scan", "gate", ("y",), (7.0, 1.5)),
    ("gate", "out_proj", (), None),
]
SIGNS = {"delta": "Δ", "hidden_states": "in", "B": "B", "C": "C"}
SIZE = (1.05, 0.62)  # of a box


def block_map(ax, shapes):
    """Draw the block and its residual stream; shapes {quantity: tuple} are written on the arrows.

    Quantities: hidden_states, x, u, delta, B, C, z, y, out. Dark boxes look at other tokens.
    """
    for x, y, text, looks in BOXES.values():
        face, ink = (COLORS["h"], "white") if looks else ("0.92", "black")
        corner = (x - SIZE[0] / 2, y - SIZE[1] / 2)
        ax.add_patch(FancyBboxPatch(corner, *SIZE, boxstyle="round,pad=0.02", fc=face, ec="none"))
        ax.text(x, y, text, ha="center", va="center", color=ink, fontsize=9)
    for start, end, names, at in ARROWS:
        (x0, y0), (x1, y1) = (BOXES[name][:2] for name in (start, end))
        if y0 == y1:
            _arrow(ax, (x0 + SIZE[0] / 2, y0), (x1 - SIZE[0] / 2, y1))
        else:
            side = 1 if y1 > y0 else -1
            _arrow(ax, (x0 + 0.25 * (x1 - x0), y0 + side * 0.34), (x1 - 0.3 * (x1 - x0), y1 - side * 0.34))
        if names:
            _label(ax, at, names, shapes)
    _bent(ax, [(1.5, 0.69), (1.5, 0.05), (7.5, 0.05), (7.5, 0.69)])
    _label(ax, (4.5, 0.2), ("z",), shapes)
    _bent(ax, [(-0.95, 1.0), (-0.95, 2.95), (9.95, 2.95), (9.95, 1.18)])
    _arrow(ax, (-1.3, 1.0), (-0.55, 1.0))
    _arrow(ax, (9.55, 1.0), (9.8, 1.0))
    ax.text(9.95, 1.0, "+", ha="center", va="center", fontsize=14)
    ax.text(4.5, 3.05, "residual stream", ha="center", va="bottom", fontsize=9)
    _label(ax, (9.8, 0.48), ("out",), shapes)
    ax.set(xlim=(-1.35, 10.5), ylim=(-0.2, 3.4))
    ax.axis("off")


def _label(ax, at, names, shapes):
    lines = [f"{SIGNS.get(name, name)} {'×'.join(map(str, shapes[name]))}" for name in names]
    ax.text(*at, "\n".join(lines), ha="center", va="center", fontsize=8, color=COLORS["u"])


def _arrow(ax, start, end):
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.35", "lw": 1.3,
                                            "shrinkA": 0, "shrinkB": 0})  # fmt: skip


def _bent(ax, points):
    ax.plot(*zip(*points[:-1], strict=True), color="0.35", lw=1.3)
    _arrow(ax, points[-2], points[-1])


def shift_register(ax, states, labels):
    """What a register of K slots holds after each token: states (L, K), oldest slot first; labels L."""
    seqlen, slots = states.shape
    top = np.abs(states).max()
    ax.imshow(states.T[::-1], cmap="RdBu", vmin=-1.6 * top, vmax=1.6 * top, aspect="auto")
    for t in range(seqlen):
        for k in range(slots):
            ax.text(t, slots - 1 - k, f"{states[t, k]:.0f}", ha="center", va="center", fontsize=9)
    ax.set_xticks(range(seqlen), labels, family="monospace", fontsize=9)
    names = ["now", *(f"{k} ago" for k in range(1, slots))]
    ax.set_yticks(range(slots), names)
    ax.set(xlabel="token read", title="the register after each token")
    ax.grid(False)


def budget(ax, parts):
    """Shares of the parameters, a bar a size: parts {label: {name: count}}, names in the same order."""
    names = list(next(iter(parts.values())))
    fills = [COLORS["u"], COLORS["y"], COLORS["delta"], COLORS["decay"], COLORS["h"], COLORS["reference"]]
    for row, counts in enumerate(parts.values()):
        total, left = sum(counts.values()), 0.0
        for name, fill in zip(names, fills, strict=True):
            share = counts[name] / total
            ax.barh(row, share, left=left, color=fill, height=0.7)
            if share > 0.06:
                ax.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color="white")
            if row == 0 and share > 0.06:
                ax.text(left + share / 2, -0.5, name, ha="center", va="bottom", color=fill)
            left += share
    small = [k for k, name in enumerate(names) if counts[name] / total <= 0.06]
    for row, k in enumerate(small):
        ax.text(1.02, row, names[k], va="center", color=fills[k])
    ax.set_yticks(range(len(parts)), list(parts))
    ax.set(xlim=(0, 1), ylim=(len(parts) - 0.5, -1.1), xlabel="share of the parameters")
    ax.grid(False)

"""Pictures of a kernel's work: who computes what, who holds what, and which bytes one load drags along."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

from mamba_ref.plots import COLORS

TENSOR_COLORS = {"u": "u", "delta": "delta", "h": "h", "state": "h", "decay": "decay", "y": "y"}
LABELS = {"delta": "Δ", "torch": "torch\npasses", "state": "chunk\nstates", "decay": "chunk\ndecays"}
LEVELS = {  # bottom, height, shade of each band
    "registers": (5.9, 4.0, "#DCEFE6"),
    "SRAM": (4.2, 0.9, "#E6EEF5"),
    "HBM": (0.3, 2.1, "#EFEFEF"),
}
CELL = (0.1, 0.25)  # width and height of one number in the registers


def tensor_color(name):
    """The colour of a quantity where it has one; grey for B, C, z and the parameters."""
    return COLORS[TENSOR_COLORS[name]] if name in TENSOR_COLORS else "0.45"


def work_map(ax, program, turn, title, label="turn of its program"):
    """Who computes what: colour is the turn in which a program stores y[d, t], white lines part programs.

    program, turn: (D, L) integers, as `Trace.writers` of the ladder returns them.
    """
    last = max(int(turn.max()), 1)
    image = ax.imshow(turn, aspect="auto", vmin=0, vmax=last, cmap="cividis")
    for d, t in np.argwhere(np.diff(program, axis=0) != 0):
        ax.plot([t - 0.5, t + 0.5], [d + 0.5, d + 0.5], color="white", lw=0.9)
    for d, t in np.argwhere(np.diff(program, axis=1) != 0):
        ax.plot([t + 0.5, t + 0.5], [d - 0.5, d + 0.5], color="white", lw=0.9)
    ax.grid(False)
    ax.set(title=title, xlabel="time t (tokens)", ylabel="channel d")
    bar = plt.colorbar(image, ax=ax, ticks=[0, last], pad=0.02, fraction=0.05)
    bar.set_label(label, labelpad=-7)
    bar.ax.set_yticklabels(["first", "last"] if turn.max() else ["only", ""], rotation=90)
    for text, side in zip(bar.ax.get_yticklabels(), ("bottom", "top"), strict=True):
        text.set_va(side)
    bar.ax.tick_params(length=0)


def traffic_rows(by_tensor, count):
    """Bytes (read, written) of each tensor -> rows for `memory_map`, in bytes per element of y.

    count: the number of elements of y. What moves less than a byte per element shares the last row.
    """
    order = ("u", "delta", "B", "C", "z", "y", "decay", "state", "torch")
    large = [n for n in order if n in by_tensor and (sum(by_tensor[n]) >= count or n in ("decay", "state"))]
    rest = [sum(pair[k] for name, pair in by_tensor.items() if name not in large) for k in (0, 1)]
    rows = [(LABELS.get(n, n), tensor_color(n), *(size / count for size in by_tensor[n])) for n in large]
    return [*rows, ("A, D,\nbias, h", "0.45", *(size / count for size in rest))]


def memory_map(
    ax, traffic, registers, sram, title="who holds what; bytes per (b, d, t)", owner="of one program"
):
    """Who holds what: three levels of memory, and between them arrows with the bytes that travel.

    traffic: list of (label, colour, bytes read, bytes written) for the tensors in HBM, left to right.
    registers: list of (label, colour, rows, columns), one cell a number, in the registers of `owner`.
    sram: what that level holds.
    """
    ax.set(xlim=(-2.6, 10), ylim=(0, 10), title=title)
    ax.axis("off")
    held = {"registers": owner, "SRAM": sram, "HBM": "of the device"}
    for name, (bottom, height, shade) in LEVELS.items():
        ax.add_patch(Rectangle((0, bottom), 10, height, color=shade, lw=0, zorder=0))
        ax.text(-0.2, bottom + height / 2, name, ha="right", va="bottom", fontsize=9, weight="bold")
        ax.text(-0.2, bottom + height / 2 - 0.05, held[name], ha="right", va="top", fontsize=8, color="0.35")
    _registers(ax, registers)
    slot, size = 10 / len(traffic), 9 if len(traffic) < 9 else 8
    for i, (label, color, read, written) in enumerate(traffic):
        x = slot * (i + 0.5)
        ax.text(x, 0.95, label, ha="center", va="center", fontsize=size, color=color, weight="bold")
        flows = [(moved, up) for moved, up in ((read, True), (written, False)) if moved > 0]
        for k, (moved, up) in enumerate(flows):
            _arrow(ax, x + (k - (len(flows) - 1) / 2) * min(0.42 * slot, 0.9), up, moved, color)


def _registers(ax, arrays):
    """One rectangle an array, side by side, drawn to the same scale."""
    y = LEVELS["registers"][0] + 1.55
    gap = (10 - sum(columns * CELL[0] for *_, columns in arrays)) / (len(arrays) + 1)
    x = gap
    for label, color, rows, columns in arrays:
        w, h = columns * CELL[0], rows * CELL[1]
        ax.add_patch(Rectangle((x, y), w, h, facecolor=color, lw=0, alpha=0.85))
        for row in range(1, rows):
            ax.plot([x, x + w], [y + row * CELL[1]] * 2, color="white", lw=0.5)
        for column in range(1, columns):
            ax.plot([x + column * CELL[0]] * 2, [y, y + h], color="white", lw=0.5)
        ax.text(x + w / 2, y - 0.1, label, ha="center", va="top", fontsize=8, color=color, weight="bold")
        x += w + gap


def _arrow(ax, x, up, size, color):
    """A vertical arrow that grows with the bytes it stands for, their number at its tail."""
    start, end = sum(LEVELS["HBM"][:2]), LEVELS["registers"][0]
    start, end = (start, end) if up else (end, start)
    tail = 0.5 + 0.75 * np.sqrt(size)
    style = f"simple,tail_width={tail},head_width={2.2 * tail + 2.5},head_length={1.2 * tail + 4}"
    ax.add_patch(FancyArrowPatch((x, start), (x, end), arrowstyle=style, mutation_scale=1, color=color, lw=0,
                                 shrinkA=0, shrinkB=0, zorder=3, alpha=0.85))  # fmt: skip
    text = f"{size:.0f}" if size >= 9.95 or abs(size - round(size)) < 0.05 else f"{size:.1f}"
    offset, side = (-0.08, "top") if up else (0.08, "bottom")
    ax.text(x, start + offset, text, ha="center", va=side, fontsize=8, color=color)


def load_map(ax, touched, itemsize, title, sector=32):
    """What one load asks for (dark) and what memory must send for it, in whole sectors (light).

    touched: (D, L) booleans over a contiguous tensor of `itemsize`-byte numbers. Returns the part of
    the sent bytes that was asked for.
    """
    at = np.flatnonzero(touched)
    number = np.arange(touched.size) * itemsize // sector  # the sector of every element
    sent = np.isin(number, number[at]).reshape(touched.shape)
    image = np.ones((*touched.shape, 3))
    image[sent] = (0.62, 0.79, 0.93)
    image[touched] = (0.0, 0.28, 0.53)
    ax.imshow(image, aspect="auto")
    useful = touched.sum() / sent.sum()
    ax.grid(False)
    ax.set(title=f"{title}: {useful:.1%} of it used", xlabel="time t (tokens)", ylabel="channel d")
    return useful

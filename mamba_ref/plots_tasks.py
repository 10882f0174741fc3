"""Pictures of the synthetic tasks: tokens, what was learned, at which lengths it holds, what Δ does."""

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

from mamba_ref.plots import COLORS, shades, token_axis


def tokens(ax, ids, labels, picked, asked):
    """Tokens (L,) as cells: `picked` places in the colour of the input, `asked` in that of the output.

    labels: what is written for each id.
    """
    for t, token in enumerate(ids):
        color = COLORS["u"] if t in picked else COLORS["y"] if t in asked else "0.92"
        ax.add_patch(Rectangle((t - 0.45, 0), 0.9, 1, color=color, alpha=1 if color == "0.92" else 0.5))
        ax.text(t, 0.5, labels[token], ha="center", va="center", family="monospace", fontsize=9)
    ax.set(xlim=(-0.6, len(ids) - 0.4), ylim=(0, 1), yticks=[], xticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def clock(ax, clock_time, events):
    """Clock time τ (L,) over tokens as stairs; dots where an event, a token that counts, is read."""
    t = np.arange(len(clock_time))
    ax.step(t, clock_time, where="post", color=COLORS["delta"], lw=1.8)
    ax.plot(t[events], clock_time[events], "o", ms=4, color=COLORS["u"])
    ax.set(xlabel="token t", ylabel="clock time τ")


def delays(ax, in_tokens, in_ticks):
    """How long ago the answer was read: histograms of delays in tokens, and in ticks of the clock."""
    bins = np.geomspace(1, 2 * max(in_tokens.max(), in_ticks.max()), 40)
    ax.hist(in_tokens.ravel(), bins, color=COLORS["other"], alpha=0.7, label="in tokens")
    ax.hist(in_ticks.ravel(), bins, color=COLORS["delta"], alpha=0.9, label="in clock time")
    ax.set(xscale="log", xlabel="delay between token and answer", ylabel="answers")
    ax.legend()


def learning(ax, curves, width=20):
    """Training accuracy, the mean over `width` steps: curves {name: (accuracy (steps,), colour)}."""
    for name, (accuracy, color) in curves.items():
        mean = np.convolve(accuracy, np.ones(width) / width, "valid")
        ax.plot(np.arange(width, len(accuracy) + 1), 100 * mean, color=COLORS[color], lw=2, label=name)
    ax.set(xlabel="training step", ylabel="right answers (%)", ylim=(0, 104))
    ax.legend()


def lengths(ax, curves, trained, chance):
    """Accuracy over length: curves {name: ({length: accuracy}, colour)}; lines: training length, chance."""
    for name, (points, color) in curves.items():
        ax.plot(list(points), [100 * v for v in points.values()], "o-", ms=4, color=COLORS[color], label=name)
    ax.axvline(trained, color="0.6", lw=1)
    ax.axhline(100 * chance, color=COLORS["reference"], ls=":", lw=1)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set(xlabel="length (tokens); line: training length", ylabel="right answers (%)", ylim=(0, 104))
    ax.legend()


def steps(ax, delta, labels, channels):
    """Δ (D, L) as a map over channels and tokens, the rows `channels` from the top; dark is a large step."""
    shown = delta[channels]
    low = max(shown.min(), 1e-4 * shown.max())
    image = ax.imshow(shown, aspect="auto", cmap=shades("delta"), norm=LogNorm(low, shown.max()))
    token_axis(ax, labels)
    ax.set(ylabel="channel", yticks=[])
    ax.grid(False)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, label="Δ")
    bar.outline.set_visible(False)


def heard(ax, share, labels, title):
    """How much of an output comes from each token, (L,), as bars."""
    ax.bar(range(len(share)), share, color=COLORS["u"])
    ax.set(title=title, xlim=(-0.5, len(share) - 0.5), ylabel="|M u|")
    token_axis(ax, labels)


def subsets(ax, tokens, chance):
    """Bars of tokens copied right (%), {what is selective: number}; a line at chance."""
    colors = [COLORS["delta"] if "Δ" in name else COLORS["other"] for name in tokens]
    ax.barh(range(len(tokens)), list(tokens.values()), 0.7, color=colors)
    for place, level in enumerate(tokens.values()):
        ax.text(level + 1, place, f"{level:.0f}", va="center", fontsize=9)
    ax.axvline(chance, color=COLORS["reference"], ls=":", lw=1)
    ax.set_yticks(range(len(tokens)), list(tokens))
    ax.set(ylim=(len(tokens) - 0.5, -0.5), xlim=(0, 112), xlabel="tokens copied right (%); dotted: chance")
    ax.grid(axis="y", visible=False)

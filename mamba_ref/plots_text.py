"""Pictures of a language model: what it learns, what a lost past costs, what sampling cuts, what it keeps."""

import numpy as np

from mamba_ref.plots import COLORS, byte_labels

SHOWN = 12  # bytes of a distribution


def learning(ax, losses, tables):
    """Loss of every step (dots) and its mean over 20; lines for tables of 0, 1, ... bytes of memory."""
    steps = np.arange(len(losses))
    ax.plot(steps, losses, ".", ms=3, color=COLORS["h"], alpha=0.35)
    width = min(20, len(losses))
    mean = np.convolve(losses, np.ones(width) / width, "valid")
    ax.plot(steps[width - 1 :], mean, color=COLORS["h"], lw=2)
    for k, level in enumerate(tables):
        ax.axhline(level, color=COLORS["other"], lw=1)
        name = f"{k} byte{'s' * (k != 1)}"
        ax.text(1.04 * len(losses), level, name, color=COLORS["other"], va="bottom", fontsize=9)
    ax.set_xlim(-0.03 * len(losses), 1.3 * len(losses))
    ax.set(xlabel="training step", ylabel="bits per byte", ylim=(1.5, 8.2), title="training")


def scores(ax, found):
    """Bits per byte as bars: found {name: (bits, colour)}, in this order from the top."""
    for row, (level, color) in enumerate(found.values()):
        ax.barh(row, level, color=COLORS[color], height=0.7)
        ax.text(level + 0.05, row, f"{level:.2f}", va="center", fontsize=9)
    ax.set_yticks(range(len(found)), list(found), fontsize=9)
    ax.set(xlabel="bits per byte, test text", xlim=(0, 5.2), ylim=(len(found) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)


def context(ax, edges, cost, reach):
    """What an empty start costs, in bits per byte, by bytes seen since then: cost of each bin of `edges`.

    reach: how many bytes a table looks back, marked by a line.
    """
    ax.stairs(cost, edges, color=COLORS["h"], lw=2.5, baseline=None)
    ax.axvline(reach, color=COLORS["other"], lw=1)
    ax.text(1.05 * reach, 1.5, f"a table sees {reach} bytes", color=COLORS["other"], va="center")
    ax.axhline(0, color=COLORS["reference"], lw=0.8)
    ax.set(xscale="log", xlabel="bytes seen since the empty state", ylabel="bits lost by it")
    ax.set_yscale("symlog", linthresh=0.01)
    ax.set_ylim(-0.006, 4)
    ax.set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    ax.minorticks_off()


def knobs(axes, cut, rows):
    """Distributions over bytes after each filter: cut {name: [p (V,), one a row]}; rows: what they follow.

    Each panel shows the SHOWN bytes likeliest before any filter; the first name is no filter.
    """
    whole = next(iter(cut.values()))
    for k, (name, pair) in enumerate(cut.items()):
        for row, p in enumerate(pair):
            ax, order = axes[row, k], np.argsort(-np.asarray(whole[row]), kind="stable")[:SHOWN]
            before, after = np.asarray(whole[row])[order], np.asarray(p)[order]
            ax.bar(range(SHOWN), before, color="0.85")
            ax.bar(range(SHOWN), after, color=COLORS["y"], width=0.5)
            ax.plot(
                np.flatnonzero(after == 0), np.zeros((after == 0).sum()), "x", color=COLORS["reference"], ms=4
            )
            ax.set_xticks(range(SHOWN), byte_labels(bytes(order.tolist())), family="monospace", fontsize=8)
            ax.tick_params(axis="x", length=0)
            ax.grid(axis="x", visible=False)
            if row == 0:
                ax.set_title(name)
    for ax, text in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(f"probability\n{text}", fontsize=9)


def memory(ax, measured):
    """Bytes kept for one sequence against its length: measured {name: (lengths, states, caches)}.

    Dots are what was measured; lines go through the first of them, the state's flat and the cache's rising.
    A ring marks where the two meet.
    """
    long = np.array([1, 2**17])
    for name, (lengths, states, caches) in measured.items():
        for what, kept, color in (("state", states, "h"), ("cache", caches, "other")):
            line = kept[0] * (long / lengths[0] if what == "cache" else np.ones(2))
            ax.plot(long, line, color=COLORS[color], lw=1.4)
            ax.plot(lengths, kept, "o", color=COLORS[color], ms=5)
            ax.text(1.3 * long[-1], line[-1], f"{what}, {name}", color=COLORS[color], va="center")
        meet = states[0] / caches[0] * lengths[0]
        ax.plot(meet, states[0], "o", mfc="none", mec=COLORS["reference"], ms=10)
    ax.set(xscale="log", yscale="log", xlabel="length (tokens)", ylabel="bytes kept")
    ax.set_xlim(0.8, 3e6)
    ax.set_xticks([1, 10, 100, 1000, 10000, 100000], ["1", "10", "100", "1k", "10k", "100k"])
    ax.minorticks_off()

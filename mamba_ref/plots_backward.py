"""Pictures of the backward pass: the scan as a graph, blame over time, slopes, bytes kept, digits lost."""

import numpy as np

from mamba_ref.plots import COLORS

ROWS = {"u": 2.0, "h": 1.0, "p": 0.0}  # height of input, state and output
SPACING = 1.5  # from one token to the next
TOKENS = ("t-1", "t", "t+1")
FORWARD = {"u": "u", "h": "h", "p": "p"}
BACKWARD = {"u": "du", "h": "g", "p": "dp"}


def dataflow(ax, backward=False):
    """Draw u_t -> h_t -> p_t and h_t -> h_{t+1} for three tokens, or the gradients that flow back.

    Every arrow carries the factor it multiplies by: Δ B into the state, A_bar from state to state, C out
    of it. Backward the factors stay and the arrows turn. Returns the arrows as ((row, token), (row,
    token), factor), row one of "u", "h", "p" and token 0, 1, 2, or -1 and 3 beyond the edge.
    """
    arrows = [(("h", k), ("h", k + 1), rf"$\bar A_{{{(*TOKENS, 't+2')[k + 1]}}}$") for k in range(-1, 3)]
    for k, t in enumerate(TOKENS):
        arrows += [(("u", k), ("h", k), rf"$\Delta_{{{t}}} B_{{{t}}}$"), (("h", k), ("p", k), f"$C_{{{t}}}$")]
    if backward:
        arrows = [(end, start, factor) for start, end, factor in arrows]
    for start, end, factor in arrows:
        _arrow(ax, start, end, factor, COLORS["g"] if backward else _color(start, end))
    names = BACKWARD if backward else FORWARD
    for row, y in ROWS.items():
        color = COLORS["g"] if backward else COLORS["y" if row == "p" else row]
        for k, t in enumerate(TOKENS):
            ax.plot(SPACING * k, y, "o", ms=30, color=color)
            ax.text(SPACING * k, y, f"${names[row]}_{{{t}}}$", ha="center", va="center", color="white")
    ax.set(xlim=(-1.2, 2 * SPACING + 1.2), ylim=(-0.45, 2.45))
    ax.axis("off")
    return arrows


def _color(start, end):
    """Forward, an arrow has the colour of what it carries: input, decayed state or output."""
    if start[0] == "u":
        return COLORS["u"]
    return COLORS["decay" if end[0] == "h" else "y"]


def _arrow(ax, start, end, factor, color):
    """One arrow between two places, shortened to leave the circles free, its factor beside it."""
    (x0, y0), (x1, y1) = ((SPACING * k, ROWS[row]) for row, k in (start, end))
    sideways = y0 == y1
    x0, x1 = (min(max(x, -1.1), 2 * SPACING + 1.1) for x in (x0, x1))
    style = {"arrowstyle": "-|>,head_width=0.25,head_length=0.5", "color": color, "lw": 1.6}
    ax.annotate("", (x1, y1), (x0, y0), arrowprops=style | {"shrinkA": 15, "shrinkB": 15})
    middle = (x0 + x1) / 2, (y0 + y1) / 2
    offset, align = ((0, 6), ("center", "bottom")) if sideways else ((6, 0), ("left", "center"))
    ax.annotate(factor, middle, offset, textcoords="offset points", ha=align[0], va=align[1], color=color)


def blame(axes, g, tau, A, held, cut):
    """How much of a loss at the last token reaches each token before it, by token and by clock time.

    axes: two. g: (L, N), A: (N,), tau: (L,), the clock of the channel. held: first and last token of a
    run with small steps; cut: a token with a large one. Circles mark 1 / |A|.
    """
    last = len(tau) - 1
    for n, decay in enumerate(A):
        for ax, time in zip(axes, (np.arange(last + 1), tau[last] - tau), strict=True):
            ax.plot(time, g[:, n], color=COLORS["g"], alpha=1 - 0.28 * n, lw=2)
        axes[1].plot(-1 / decay, np.exp(-1), "o", mfc="none", mec=COLORS["reference"], ms=8)
        at = min(-0.55 / decay * np.log(1e6), 0.62 * tau[last])  # clock time at which the label stands
        label = {"ha": "right", "va": "bottom", "color": COLORS["g"]}
        axes[1].text(at, 1.5 * np.exp(decay * at), f"A = {decay:.0f}", **label)
    axes[0].axvspan(held[0] - 0.5, held[1] + 0.5, color=COLORS["delta"], alpha=0.12, lw=0)
    axes[0].text(sum(held) / 2, 2.2, "small Δ: hold", color=COLORS["delta"], ha="center")
    axes[0].axvline(cut, color=COLORS["delta"], ls=":", lw=1.2)
    axes[0].text(cut - 1, 2.2, "large Δ: cut", color=COLORS["delta"], ha="right")
    axes[0].set(
        yscale="log", ylim=(1e-6, 6), xlabel="token t", ylabel=f"blame $g_t$ for a loss at token {last}"
    )
    axes[1].set(yscale="log", xlabel=f"clock time back from token {last}", xlim=(tau[last], -0.05))
    axes[1].text(tau[last] / 2, 2.2, "circles: 1/|A|", ha="center")


def slopes(axes, x, Delta, slope_delta, gate, slope_gate):
    """Softplus and SiLU over x, each with its slope; filled where the gate's slope is negative."""
    panels = ((Delta, slope_delta, "delta", "Δ"), (gate, slope_gate, "reference", "SiLU(z)"))
    for ax, (value, slope, color, name) in zip(axes, panels, strict=True):
        ax.plot(x, value, color=COLORS[color])
        ax.plot(x, slope, color=COLORS["g"])
        ax.text(1.4, 2.3, name, color=COLORS[color], ha="right")
        ax.set(xlim=(-6, 4), ylim=(-0.5, 3))
    axes[0].text(-5.8, 0.42, "slope $1 - e^{-Δ}$", color=COLORS["g"])
    axes[1].text(-5.8, 0.42, "slope", color=COLORS["g"])
    axes[1].fill_between(x, slope_gate, 0, where=slope_gate < 0, color=COLORS["g"], alpha=0.25, lw=0)
    axes[0].set(title="softplus", xlabel="x = delta + delta_bias")
    axes[1].set(title="gate", xlabel="z")


def memory_by_length(ax, lengths, measured, predicted):
    """Bytes against L, counted (dots) and predicted (lines), beside one tensor like u in float64.

    measured: {"autograd", "all states", "chunks"}, a size for each of lengths. predicted: a function of
    L that returns one size for each of the three.
    """
    long = [2**k for k in range(4, 21)]
    ends = predicted(long[-1])
    labels = {"autograd": ("other", "autograd", 1), "all states": ("h", "all states", 0.55)}
    labels["chunks"] = ("g", "chunks of √L", 1)
    for name, (color, label, below) in labels.items():
        ax.plot(long, [predicted(seqlen)[name] for seqlen in long], color=COLORS[color])
        ax.plot(lengths, measured[name], "o", ms=5, color=COLORS[color])
        ax.text(1.5 * long[-1], below * ends[name], label, color=COLORS[color], va="center")
    ax.plot(long, [8 * seqlen for seqlen in long], ":", color=COLORS["reference"], lw=1)
    ax.text(1.5 * long[-1], 8 * long[-1], "one input, u", va="center")
    ax.set(xscale="log", yscale="log", xlabel="length L (tokens)", ylabel="bytes per channel (N = 16)")
    ax.set_xlim(10, 3e8)
    ax.set_xticks([1e2, 1e4, 1e6])
    ax.minorticks_off()


def memory_by_chunk(ax, chunks, saved, working, measured, seqlen):
    """States alive at the worst moment of the backward pass: kept, at work, both; measured as dots."""
    ax.plot(chunks, saved, "--", color=COLORS["h"])
    ax.plot(chunks, working, ":", color=COLORS["h"])
    ax.plot(chunks, saved + working, color=COLORS["g"])
    ax.plot(chunks, measured, "o", ms=5, color=COLORS["g"])
    ax.text(chunks[1], 0.35 * saved[1], "kept, L/c", color=COLORS["h"], ha="center")
    ax.text(chunks[-2], 0.35 * working[-2], "at work, c", color=COLORS["h"], ha="center")
    ax.text(chunks[len(chunks) // 2], 2 * measured.min(), "both", color=COLORS["g"], ha="center")
    ax.set(xscale="log", yscale="log", xlabel="chunk c (tokens)", ylabel=f"states alive (L = {seqlen})")
    ax.set_xticks(chunks[::2], chunks[::2])
    ax.minorticks_off()


def lost_digits(axes, exponent, w_lost, dA_lost):
    """Relative errors of w and of dA against the decay exponent, for w kept apart and for w = h - x."""
    colors = {"kept apart": COLORS["h"], "h - x": COLORS["other"]}
    for ax, lost, title in ((axes[0], w_lost, r"$w_t = \bar A_t h_{t-1}$"), (axes[1], dA_lost, "dA")):
        for name, color in colors.items():
            ax.plot(exponent, lost[name], "o-", color=color)
        ax.plot(exponent, 2.0**-24 * np.exp(exponent), ":", color=COLORS["reference"])
        ax.set(yscale="log", ylim=(3e-9, 3), xlabel="decay of a token, −ΔA", title=title)
    axes[0].text(7, 6e-4, "$2^{-24} e^{-ΔA}$", ha="right")
    axes[0].text(9.5, 1e-5, "w = h − x", color=colors["h - x"])
    axes[0].text(16, 8e-9, "w kept apart", color=colors["kept apart"], ha="right")
    axes[0].set_ylabel("relative error, float32")

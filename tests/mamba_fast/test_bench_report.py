"""What a bench says about its rows: the table, the findings, the file and the figures."""

import json

import pytest
import torch

from mamba_fast.bench import attention, figure, report, scan_grid, scan_options


def row(name, role, forward, backward=None, error=1e-3, case="a", dtype="bfloat16", **more):
    times = {"forward": {"median": forward, "p10": 0.9 * forward, "p90": 1.1 * forward}, "forward_limit": 0.5}
    if backward:
        times["backward"] = {"median": backward, "p10": backward, "p90": backward}
        times |= {"backward_limit": 1.0, "forward_training": times["forward"]}
    more = {"shape": [1, 2, 3, 16]} | more
    head = {"case": case, "dtype": dtype, "name": name, "role": role}
    return head | more | times | {"errors": {"y": error}}


ROWS = [
    row("cuda", "ours", 1.0, 4.0),
    row("triton", "ours", 3.0, 8.0, error=4e-3),
    row("published", "peer", 2.5, 12.0, error=2e-3),
]


def test_the_table_says_how_many_times_the_limit_and_how_many_times_ours():
    lines = [line.split() for line in report.table(ROWS).splitlines()]
    assert lines[2] == "a bfloat16 limit 0.5000 1.00 0.50x 1.0000 1.00 0.25x".split()
    assert lines[3] == "a bfloat16 cuda 1.0000 20.0% 2.00 1.00x 4.0000 0.0% 4.00 1.00x".split()
    assert lines[5] == "a bfloat16 published 2.5000 20.0% 5.00 2.50x 12.0000 0.0% 12.00 3.00x".split()


def test_the_findings_compare_speed_and_error_with_the_published_kernel():
    rows = [*ROWS, row("cuda", "ours", 1.0, case="b"), row("published", "peer", 1.2, case="b")]
    found = report.against_peer(rows)
    assert found[:4] == [
        "cuda forward: 1.20x (b bfloat16) to 2.50x (a bfloat16) the published speed",
        "cuda backward: 3.00x (a bfloat16) to 3.00x (a bfloat16) the published speed",
        "cuda forward_training + backward: 2.90x (a bfloat16) to 2.90x (a bfloat16) the published speed",
        "cuda: error up to 1.00x the published kernel's (y, b bfloat16)",
    ]
    assert found[-1] == "triton: error up to 2.00x the published kernel's (y, a bfloat16)"


def test_the_grid_finds_ratios_and_how_flat_time_is():
    grid = [
        row(n, r, f, 2 * f, shape=[1, 2, 3, 16])
        for n, r, f in (("cuda", "ours", 1), ("published", "peer", 2))
    ]
    for seqlen, time in ((2048, 1.0), (4096, 2.2)):
        along = {"case": f"length {seqlen}", "shape": [1, 8, seqlen, 16]}
        grid += [row("cuda", "ours", time, time, **along), row("published", "peer", time, time, **along)]
    assert scan_grid.ratios(grid, "forward") == [(6, 2.0)]
    assert "cuda forward: 10% between lengths, time per element" in scan_grid.findings(grid)


def test_the_cost_of_an_option_is_beside_the_same_call_without():
    rows = [row("cuda", "ours", 2.0, 4.0), row("seq_idx", "other", 2.2, 5.0)]
    assert scan_options.findings(rows) == [
        "seq_idx, forward: +10% (a) to +10% (a)",
        "seq_idx, backward: +25% (a) to +25% (a)",
        "seq_idx, forward + backward: +20% (a) to +20% (a)",
    ]


def test_packed_rows_hold_sequences_of_one_length():
    found = {
        k.name: k.run.keywords for k in scan_options.with_options("torch", (1, 3, 8, 2), torch.device("cpu"))
    }
    assert found["cu_seqlens"]["cu_seqlens"].tolist() == [0, 2, 4, 6, 8]
    assert found["seq_idx"]["seq_idx"].tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    assert "cu_seqlens" not in {
        k.name for k in scan_options.with_options("torch", (2, 3, 8, 2), torch.device("cpu"))
    }


def test_attention_is_compared_with_its_best_kind():
    rows = []
    for case, scan_ms, flash, cudnn in (("L=1", 1.0, 0.5, 0.4), ("L=2", 1.0, 3.0, 2.0)):
        rows += [row("cuda", "ours", scan_ms, case=case), row("published", "peer", 0.1, case=case)]
        rows += [row(n, "peer", t, case=case) for n, t in (("SDPA flash", flash), ("SDPA cuDNN", cudnn))]
    assert attention.findings(rows) == [
        "attention over scan: L=1 0.40x, L=2 2.00x",
        "the scan is behind at: L=1",
    ]


@pytest.mark.parametrize("name", sorted(figure.TITLES))
def test_every_figure_can_be_drawn_from_a_result_of_a_gpu(name, tmp_path):
    rows = []
    for seqlen in (512, 2048, 2**20):
        shape = [1, 1536, seqlen, 16]
        rows += [r | {"case": f"length {seqlen}", "shape": shape} for r in ROWS]
        rows += [r | {"case": f"1 x {seqlen}", "shape": shape, "dtype": "float32"} for r in ROWS]
    rows = [r | {"token": 1.0, "token_limit": 0.4, "tokens_per_s": 900.0} for r in rows]
    rows = [r | {"time": {"median": 2.0}} for r in rows]
    rows = [r | {"peak_bytes": 10**9} if r["dtype"] == "bfloat16" else r for r in rows]  # a graph has none
    facts = {"bench": name, "device": "NVIDIA H200", "date": "2026-11-25", "rows": rows}
    figure.draw(facts, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_result_is_written_a_row_a_line_with_four_digits(tmp_path):
    report.write(
        {"checks": "passed", "copy_bytes_per_s": 4.27123e12, "rows": ROWS[:2]}, tmp_path / "new" / "a.json"
    )
    text = (tmp_path / "new" / "a.json").read_text("utf-8")
    assert len(text.splitlines()) == 8  # brace, two facts, "rows", two rows, two ends
    found = json.loads(text)
    assert (found["checks"], found["copy_bytes_per_s"]) == ("passed", 4.271e12)
    assert found["rows"] == report.rounded(ROWS[:2])

"""The command of docs/compat.md that times transformers' model compares first; here at a size for a CPU."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
import compat_speed

SMALL = compat_speed.Shape(width=16, layers=1, vocab=40, batch=1, length=12)


def test_kernels_agree_before_they_are_timed():
    rows = compat_speed.main(SMALL)
    assert {work for _, work in rows} == {"forward + backward", "forward"}
    assert all({"slow", "ours"} <= times.keys() and min(times.values()) > 0 for times in rows.values())


def test_wrong_logits_are_not_timed(monkeypatch):
    build = compat_speed.theirs

    def broken(module, *args):
        model = build(module, *args)
        if module.__name__.endswith("ours"):
            model.backbone.norm_f.weight.data[0] += 0.1
        return model

    monkeypatch.setattr(compat_speed, "theirs", broken)
    with pytest.raises(AssertionError, match="ours"):
        compat_speed.main(SMALL)

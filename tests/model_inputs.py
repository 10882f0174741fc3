"""A small language model of the reference, the same weights in ours, and the comparison of their logits."""

import copy

import torch

from mamba_fast import MambaConfig, MambaLMHeadModel
from mamba_ref import MambaLM
from mamba_ref.checks import bound, check

D_MODEL, N_LAYER, VOCAB = 10, 2, 27
BLOCK = dict(d_state=5, d_conv=3, dt_min=0.1, dt_max=1)
CONFIG = MambaConfig(d_model=D_MODEL, n_layer=N_LAYER, vocab_size=VOCAB, ssm_cfg=dict(BLOCK))


def reference_model(seed=0):
    """A `MambaLM` in float64 whose parameters float32 holds exactly, none at its initial value."""
    torch.manual_seed(seed)
    model = MambaLM(D_MODEL, N_LAYER, VOCAB, **BLOCK)
    with torch.no_grad():
        model.backbone.embedding.weight *= 20  # logits far from equal
        for name, p in model.named_parameters():
            if name.endswith("out_proj.weight"):
                p *= 30  # and decided by the layers, not by the token alone
            if name.endswith(("norm.weight", "norm_f.weight", ".D", "A_log")):
                p += torch.rand(p.shape) / 2
    return model.double()


def fast_model(reference, device="cpu", dtype=torch.float32):
    """Ours with the weights of the reference."""
    model = MambaLMHeadModel(copy.deepcopy(CONFIG), device=device, dtype=dtype)
    model.load_state_dict(reference.state_dict())
    return model


def token_ids(seed, batch, seqlen, device="cpu"):
    ids = torch.randint(VOCAB, (batch, seqlen), generator=torch.Generator().manual_seed(seed))
    return ids.to(device)


@torch.no_grad()
def check_logits(claim, got, reference, pieces):
    """Assert that `got` are the reference's float64 logits of each of `pieces`, (B, L) ids, side by side.

    The bound comes from the reference in float32, on the same pieces.
    """
    single = copy.deepcopy(reference).float()
    pieces = [ids.cpu() for ids in pieces]
    want, plain = (torch.cat([model(ids) for ids in pieces], 1) for model in (reference, single))
    check(claim, got, want, bound(plain, want))


def random_states(model, rows, seed):
    """Nonzero states of every layer, as `initial_states` takes them."""
    generator = torch.Generator().manual_seed(seed)
    zeros = model.allocate_inference_cache(rows, 0)
    return {
        i: tuple(torch.randn(v.shape, generator=generator).to(v.device, v.dtype) for v in pair)
        for i, pair in zeros.items()
    }

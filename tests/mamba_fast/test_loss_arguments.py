"""What `linear_cross_entropy_fn` refuses: the message names the argument, what came, what is accepted."""

import pytest
import torch
from loss_inputs import inputs_of

from mamba_fast import linear_cross_entropy_fn

HALF = torch.bfloat16

BAD = [
    (TypeError, "hidden_states", [1.0], "got list", "expected a torch.Tensor"),
    (TypeError, "hidden_states", torch.ones(3, 5, dtype=torch.int64), "got int64", "bfloat16 or float64"),
    (ValueError, "hidden_states", torch.tensor(1.0), "got ()", "(..., E)"),
    (ValueError, "weight", torch.ones(4, 6), "got (4, 6)", "(V, 5)"),
    (ValueError, "weight", torch.ones(0, 5), "got (0, 5)", "V >= 1"),
    (ValueError, "weight", torch.ones(4, 5, device="meta"), "got meta", "expected device cpu"),
    (TypeError, "weight", torch.ones(4, 5, dtype=HALF), "got bfloat16", "float32 (that of hidden_states)"),
    (ValueError, "bias", torch.ones(5), "got (5,)", "(4)"),
    (TypeError, "labels", torch.ones(3), "got float32", "int32 or int64"),
    (ValueError, "labels", torch.ones(2, dtype=torch.int64), "got (2,)", "(3)"),
    (ValueError, "labels", torch.tensor([1, 4, 0]), "got 4", "0 to 3 or ignore_index = -100"),
    (ValueError, "labels", torch.tensor([1, 2, -1]), "got -1", "0 to 3 or ignore_index = -100"),
    (TypeError, "ignore_index", None, "got NoneType", "expected an int"),
    (ValueError, "reduction", "max", "got 'max'", "mean, sum, none"),
    (ValueError, "vocab_size", 5, "got 5", "None or 1 to V = 4"),
    (ValueError, "vocab_size", 0, "got 0", "None or 1 to V = 4"),
    (ValueError, "backend", "cuda", "got 'cuda'", "None or one of torch, triton"),
]


@pytest.mark.parametrize("error, name, value, came, accepted", BAD)
def test_an_error_names_the_argument_what_came_and_what_is_accepted(error, name, value, came, accepted):
    given = inputs_of((3,), 5, 4, 17, ignored=0) | {name: value}
    with pytest.raises(error) as caught:
        linear_cross_entropy_fn(**given)
    message = str(caught.value)
    assert message.startswith(f"{name}: "), message
    assert came in message, message
    assert accepted in message, message

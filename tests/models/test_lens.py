"""The logit lens reads a direction through the final norm and the unembedding of any architecture."""

from __future__ import annotations

import pytest
import torch

from conftest import make_model
from crossdiff.errors import UserError
from crossdiff.models.access import decoder_layers
from crossdiff.models.lens import direction_logits

KINDS = ["llama", "gpt2", "gpt_neox", "opt", "gemma2", "mamba2", "lfm2", "recurrent_gemma"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_lens_is_the_model_above_its_last_layer(kind: str) -> None:
    """What a model makes of a residual stream that is the direction at every position, but for the bias of its norm."""
    model = make_model(kind)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))

    def logits_of(stream: torch.Tensor) -> torch.Tensor:
        def replace(_module: torch.nn.Module, _input: object, output: object) -> object:
            hidden = output[0] if isinstance(output, tuple) else output
            replaced = stream.expand_as(hidden)
            return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

        handle = decoder_layers(model)[-1].register_forward_hook(replace)
        try:
            with torch.no_grad():
                return model(torch.tensor([[5, 6, 7, 8]])).logits[0, -1].double()
        finally:
            handle.remove()

    expected = logits_of(direction) - logits_of(torch.zeros(16))
    cap = getattr(model.config, "final_logit_softcapping", None) or getattr(model.config, "logits_soft_cap", None)
    if cap is not None:  # a monotone function of the logits, which the lens leaves out
        expected = torch.atanh(expected / cap) * cap
    torch.testing.assert_close(direction_logits(model, direction).double(), expected, rtol=1e-4, atol=1e-5)


def test_an_unembedding_of_another_width_has_no_lens() -> None:
    model = make_model("opt", word_embed_proj_dim=8)
    with pytest.raises(UserError, match=r"reads vectors of 8 dimensions, and its residual stream has 16, .* unavailable"):
        direction_logits(model, torch.ones(16))

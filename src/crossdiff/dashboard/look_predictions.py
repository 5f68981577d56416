"""Both models' predictions on one text, computed now."""

from __future__ import annotations

import polars as pl
import torch

from crossdiff.dashboard.looks import Predicted, decoder
from crossdiff.errors import UserError
from crossdiff.latents.groups import GROUPS, group_of
from crossdiff.look.predictions import compare
from crossdiff.models.pair import Pair
from crossdiff.sources import SOURCES
from crossdiff.text.sequences import TokenSequence


@torch.no_grad()
def predicted(pair: Pair, sequence: TokenSequence) -> Predicted:
    """Compare both models' predictions after each token of a text, as the first look does."""
    ids = torch.from_numpy(sequence.token_ids.astype("int64")).unsqueeze(0)
    logits, following = [], []
    for source in SOURCES:
        model = pair.model(source)
        own = pair.ids_of(source, ids)
        logits.append(model(input_ids=own.to(next(model.parameters()).device), use_cache=False).logits[0])
        following.append(torch.cat([own[0, 1:], torch.tensor([-1])]))
    found = compare(*logits, *(each.to(logits[0].device) for each in following))
    if not bool(found.kl.isfinite().all()):
        raise UserError("a model gives NaN or infinite logits on this text; set model_dtype to float32")
    table = pl.DataFrame({
        "token_id": sequence.token_ids.astype("int64"), "next_id": following[1].numpy(),
        "group": [GROUPS[index] for index in group_of(sequence.flags)],
        **{name: getattr(found, name).numpy() for name in found.__dataclass_fields__},
    })  # fmt: skip
    return Predicted(table, decoder(pair.tokenizer))

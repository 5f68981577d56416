"""Detection and fuzzing themselves, tested where the answer is known: latents planted on the embedded pair's behaviours, in its
own conversations, with an oracle that explains and judges by the patterns of these behaviours."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from oracle import answer_by_pattern
from scripted import scripted

from crossdiff.causal.answers import read_rules
from crossdiff.config import AnalyzeConfig, DatasetConfig, L1Config
from crossdiff.crosscoder.crosscoder import Crosscoder, new_crosscoder
from crossdiff.interp.cache import Cache
from crossdiff.interp.client import Client
from crossdiff.interp.contexts import LatentContexts, latent_contexts
from crossdiff.interp.interpret_config import InterpretConfig
from crossdiff.interp.prompts import CLOSE, OPEN, Renderer
from crossdiff.interp.responses import ask_all, no_responses
from crossdiff.interp.scorer import Scorer
from crossdiff.latents.analyze import Analysis, analyze
from crossdiff.models.loading import load_tokenizer
from crossdiff.pairs import RULES, demo_path
from crossdiff.text.documents import read_documents
from crossdiff.text.sequences import tokenise
from stores import PAIR, make_store

pytestmark = pytest.mark.slow
BEHAVIOURS = ("identity", "knowledge_gap", "refusal")
PATTERNS = {name: rule.pattern for name, rule in read_rules(RULES).behaviours.items() if name in BEHAVIOURS}
LENGTH, N_NOISE, N_DOCUMENTS, N_CONTEXTS = 40, 5, 1200, 12
D = len(BEHAVIOURS) + N_NOISE


def planted_tokens(tokenizer: Any, ids: list[int]) -> torch.Tensor:
    """1 where a token lies in words that a behaviour's pattern matches, `[token, behaviour]`."""
    pieces = [tokenizer.decode([token]) for token in ids]
    text = "".join(pieces)
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
    starts = ends - torch.tensor([len(piece) for piece in pieces])
    found = torch.zeros(len(ids), len(BEHAVIOURS))
    for column, name in enumerate(BEHAVIOURS):
        for match in re.finditer(PATTERNS[name], text):
            found[(starts < match.end()) & (ends > match.start()), column] = 1
    return found


def planted_crosscoder() -> Crosscoder:
    """Latent k reads and writes dimension k: the behaviours' of the chat model alone, the others of both."""
    coder = new_crosscoder(D, torch.zeros(2, D), 1.0, L1Config(), 1.0, 0)
    encoder, decoder = torch.zeros(D, 2, D), torch.zeros(D, 2, D)
    for latent in range(D):
        encoder[latent, 1, latent] = decoder[latent, 1, latent] = 1.0
        decoder[latent, 0, latent] = 0.01 if latent < len(BEHAVIOURS) else 1.0
    # Every latent has a small random part, so that each has nearest neighbours.
    decoder += 0.01 * torch.randn(decoder.shape, generator=torch.Generator().manual_seed(0))
    coder.encoder, coder.decoder = encoder.flatten(1), decoder.flatten(1)
    coder.encoder_bias = torch.full((D,), -1.5)
    coder.decoder_bias = torch.zeros(2 * D)
    coder.origin = {"sources": ["base", "chat"], "pair": PAIR, "layer": 1}
    coder.origin |= {"training_tokens": 1, "settings": {"decoder_norm": 1.0}}
    return coder


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[LatentContexts], Renderer, InterpretConfig]:
    folder = tmp_path_factory.mktemp("oracle")
    tokenizer = load_tokenizer("demo:chat")
    files = [demo_path(name) for name in ("demo:chat_test", "demo:chat_train")]
    datasets = [DatasetConfig(path=str(file), max_documents=N_DOCUMENTS) for file in files]
    sequences = [tokenise(document, tokenizer, LENGTH)[0].token_ids for document in read_documents(datasets)]
    ids = [sequence.tolist() for sequence in sequences if len(sequence) == LENGTH]
    tokens = torch.tensor(ids).flatten()
    generator = torch.Generator().manual_seed(0)
    activations = 0.1 * torch.randn(len(tokens), 2, D, generator=generator)
    activations[:, 1, : len(BEHAVIOURS)] += 3 * torch.cat([planted_tokens(tokenizer, sequence) for sequence in ids])
    for noise in range(N_NOISE):
        activations[:, :, len(BEHAVIOURS) + noise] += 3 * (tokens % 40 == noise).float().unsqueeze(1)
    store = make_store(folder / "store", activations, LENGTH, 20 * LENGTH, 0.5, tokens)
    coder, config = planted_crosscoder(), InterpretConfig(contexts=N_CONTEXTS, embedding="none")
    analyze([Analysis(folder, coder)], store, tokenizer, AnalyzeConfig(blocks=5, min_active=20))
    table = pl.read_parquet(folder / "latents.parquet")
    latents = list(range(len(BEHAVIOURS)))
    return latent_contexts(coder, store, table, folder, latents, config, lambda *a, **k: None), Renderer(tokenizer), config


def explained(user: str, shift: int) -> str:
    """The pattern of the behaviour that most marked words show, or of one `shift` further."""
    marked = re.findall(f"{OPEN}(.*?){CLOSE}", user)
    shown = [sum(re.search(PATTERNS[name], words) is not None for words in marked) for name in BEHAVIOURS]
    return PATTERNS[BEHAVIOURS[(shown.index(max(shown)) + shift) % len(BEHAVIOURS)]]


def interpreted(planted: tuple[list[LatentContexts], Renderer, InterpretConfig], shift: int, folder: Path) -> pl.DataFrame:
    latents, renderer, config = planted
    cache = Cache(folder / f"{shift}.sqlite")

    async def ask(url: str) -> Any:
        client = Client(config.model_copy(update={"server": url, "model": "oracle"}), cache)
        try:
            return await ask_all(latents, client, renderer, config, lambda n: None)
        finally:
            await client.close()

    with scripted(answer_by_pattern(lambda user: explained(user, shift))) as server:
        responses = asyncio.run(ask(server.url))
    cache.close()
    return Scorer(renderer, None, config, "x").tables(latents, responses, lambda n: None)[0]


def test_a_right_explanation_scores_high_and_a_wrong_one_half(
    planted: tuple[list[LatentContexts], Renderer, InterpretConfig], tmp_path: Path
) -> None:
    right, wrong = interpreted(planted, 0, tmp_path), interpreted(planted, 1, tmp_path)
    assert right["explanation"].to_list() == [PATTERNS[name] for name in BEHAVIOURS]
    assert right["interpretation_reason"].to_list() == [None] * 3
    for score in ("detection", "fuzzing"):
        assert right[score].min() > 0.9
        assert right[f"{score}_low"].min() > 0.75
        assert wrong[f"{score}_random"].is_between(0.4, 0.6).all()
        assert (wrong[f"{score}_high"] < right[f"{score}_low"]).all()
        assert right[f"{score}_random"].min() > 0.9 and right[f"{score}_similar"].min() > 0.9
        # The nearest latents are those of the other behaviours, so a wrong pattern picks just their contexts.
        assert wrong[f"{score}_similar"].max() < 0.55


def test_words_predict_latents_that_are_words(planted: tuple[list[LatentContexts], Renderer, InterpretConfig]) -> None:
    """The baseline, too, is high where a few words decide, and held-out contexts are none that were shown or fitted on."""
    latents, renderer, config = planted
    scorer = Scorer(renderer, None, config, "x")
    rows, contexts = scorer.tables(latents, [no_responses(each) for each in latents], lambda n: None)
    assert rows["bag_of_words"].min() > 0.9
    for each in latents:
        shown = {window.document for window in each.shown}
        fitted = {window.document for _, window in each.train.items()}
        scored = {window.document for _, window in each.test.items()}
        assert scored and not scored & shown and not scored & fitted
        assert {len(windows) for windows in each.test.kinds.values()} == {N_CONTEXTS}
    column = pl.col("text").str.contains(PATTERNS["identity"])
    identity = contexts.filter(pl.col("latent") == 0)
    assert identity.filter(pl.col("kind") == "active").select(column).to_series().mean() > 0.9
    assert not identity.filter(pl.col("kind") != "active").select(column).to_series().any()

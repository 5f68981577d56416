"""The planted activations are what the settings say: kinds, rates, correlation, and a store that others can read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from crossdiff.activations.store import verify
from crossdiff.truth.planted import BASE_INDEX, CHAT_INDEX, KINDS, Concepts, draw, plant, write_store
from crossdiff.truth.truth_config import PlantedConfig

CONFIG = PlantedConfig(
    d_model=12, shared=8, chat_only=4, base_only=3, weaker=4, rotated=3, decoupled=4, active=2.5, documents=600,
    document_tokens=20, topics=4, noise=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def concepts() -> Concepts:
    return plant(CONFIG)


@pytest.fixture(scope="module")
def amplitude(concepts: Concepts) -> torch.Tensor:
    return torch.cat([tokens.amplitude for tokens in draw(concepts, CONFIG)], dim=1)


def of(concepts: Concepts, kind: str) -> torch.Tensor:
    return concepts.kind == KINDS.index(kind)


def test_kinds_are_what_they_are_called(concepts: Concepts, amplitude: torch.Tensor) -> None:
    base, chat = amplitude[BASE_INDEX], amplitude[CHAT_INDEX]
    assert not base[:, of(concepts, "chat_only")].any() and not chat[:, of(concepts, "base_only")].any()
    for kind in ("shared", "rotated"):
        assert torch.equal(base[:, of(concepts, kind)], chat[:, of(concepts, kind)])
    weaker = of(concepts, "weaker")
    fires = chat[:, weaker] > 0
    ratio = (base[:, weaker] / chat[:, weaker])[fires]
    assert float(ratio.min()) >= 0.3 and float(ratio.max()) <= 0.8
    cosine = (concepts.directions[BASE_INDEX] * concepts.directions[CHAT_INDEX]).sum(1)
    turned = of(concepts, "rotated")
    assert float(cosine[turned].max()) <= 0.3 + 1e-6 and float(cosine[turned].min()) >= -1e-6
    torch.testing.assert_close(cosine[~turned], torch.ones(int((~turned).sum())))


def test_decoupled_concepts_share_part_of_their_tokens_and_no_amplitude(concepts: Concepts, amplitude: torch.Tensor) -> None:
    base, chat = (side[:, of(concepts, "decoupled")] for side in amplitude)
    both, either = (base > 0) & (chat > 0), (base > 0) | (chat > 0)
    assert float(both.sum() / either.sum()) == pytest.approx(0.6, abs=0.05)
    strength = concepts.strength[CHAT_INDEX, of(concepts, "decoupled")]
    pairs = torch.stack([(base / strength)[both].log(), (chat / strength)[both].log()])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.1


def test_rates_topics_and_superposition(concepts: Concepts, amplitude: torch.Tensor) -> None:
    assert CONFIG.n_concepts == 26 > CONFIG.d_model
    fires = (amplitude > 0).float()
    # The topics of 600 documents differ from their mean a little.
    assert float(fires[CHAT_INDEX].sum(1).mean()) == pytest.approx(CONFIG.active, rel=0.1)
    per_document = fires.amax(0).view(CONFIG.documents, -1, CONFIG.n_concepts).sum(1)
    correlation = torch.corrcoef(per_document.T)
    same = concepts.topic.unsqueeze(0) == concepts.topic.unsqueeze(1)
    off = ~torch.eye(CONFIG.n_concepts, dtype=torch.bool)
    assert float(correlation[same & off].mean()) > 0.1 > float(correlation[~same].mean())


def test_activations_are_the_sum_of_the_concepts(concepts: Concepts) -> None:
    tokens = next(draw(concepts, CONFIG))
    expected = np.einsum("stc,scd->tsd", tokens.amplitude.double().numpy(), concepts.directions.double().numpy())
    np.testing.assert_allclose(tokens.h.numpy(), expected + concepts.mean.numpy(), atol=1e-5)
    noisy = next(draw(concepts, CONFIG.model_copy(update={"noise": 0.5})))
    assert float((noisy.h - tokens.h).std()) == pytest.approx(0.5, rel=0.05)


def test_draws_depend_on_seed_and_stream(concepts: Concepts) -> None:
    first = next(draw(concepts, CONFIG))
    assert torch.equal(first.h, next(draw(concepts, CONFIG)).h)
    assert not torch.equal(first.h, next(draw(concepts, CONFIG, stream=1)).h)
    assert not torch.equal(concepts.directions, plant(CONFIG.model_copy(update={"seed": 1})).directions)


def test_the_store_is_whole_and_normalised(tmp_path: Path, concepts: Concepts) -> None:
    store = write_store(tmp_path / "store", concepts, CONFIG)
    assert verify(store.folder) == []
    assert store.n_tokens == 600 * 20 and store.documents.filter(split="heldout").height == 60
    rows = store.rows("train")
    h = store.gather(rows)
    assert torch.equal(h, torch.cat([tokens.h for tokens in draw(concepts, CONFIG)])[: len(rows)])
    x = (h - store.normalisation.mean) * store.normalisation.scale
    assert float(x.square().sum(2).mean()) == pytest.approx(CONFIG.d_model, rel=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"weaker_low": 0.9}, "weaker_low 0.9 is above weaker_high"), ({"topics": 1}, "more than the 1 topics")],
)
def test_settings_that_cannot_be(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlantedConfig(**values)  # type: ignore[arg-type]

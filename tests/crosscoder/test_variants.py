"""The parts a coder is made of: structures hold through training, views are the maps they say, a new kind fits in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field

from crossdiff.activations.store import Store
from crossdiff.config import (
    BatchTopKConfig,
    CrosscoderConfig,
    DesignatedConfig,
    DifferenceConfig,
    FreeConfig,
    JumpReLUConfig,
    Kind,
    L1Config,
    PartitionedConfig,
    SingleConfig,
    Sparsity,
    TopKConfig,
    validate,
)
from crossdiff.crosscoder.checkpoint import load
from crossdiff.crosscoder.kernels import Code, Encoded
from crossdiff.crosscoder.metrics import health, heldout_sums
from crossdiff.crosscoder.sparsity import Rule
from crossdiff.crosscoder.structure import check_sizes, constraint_of
from crossdiff.crosscoder.train import train
from crossdiff.crosscoder.view import identity, view_of
from crossdiff.errors import UserError
from crossdiff.sources import SOURCES
from planted import CHAT_ONLY, planted_activations
from stores import make_store


def config(sparsity: Any, **changes: Any) -> CrosscoderConfig:
    values = {"n_latents": 32, "batch_size": 128, "epochs": 8, "warmup_steps": 5, "lr": 3e-3, "decoder_norm": 0.3, **changes}
    return CrosscoderConfig(sparsity=sparsity, **values)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"), planted_activations(6000)[0])


VARIANTS = {
    "l1": config(L1Config(mu=0.5)),
    "batchtopk": config(BatchTopKConfig(k=1)),
    "topk": config(TopKConfig(k=1)),
    "jumprelu": config(JumpReLUConfig(weight=0.3, bandwidth=0.5)),
    "designated": config(L1Config(mu=0.5), structure=DesignatedConfig(shared_share=0.25)),
    "partitioned": config(BatchTopKConfig(k=1), structure=PartitionedConfig(exclusive_share=0.125)),
    "difference": config(BatchTopKConfig(k=1), inputs=DifferenceConfig()),
    "single": config(TopKConfig(k=1), inputs=SingleConfig(source="chat")),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_and_round_trips(tmp_path: Path, store: Store, name: str) -> None:
    coder = train(tmp_path, store, VARIANTS[name])
    report = health(coder, heldout_sums(coder, store, "heldout", 1000))
    assert report["fve"]["total"] > 0.3, report["fve"]
    again = load(tmp_path)
    h = store.gather(store.rows("heldout")[:50])[:, [store.sources.index(name) for name in coder.view.reads]]
    assert torch.equal(again.reconstruct(h), coder.reconstruct(h))
    assert again.view.names == coder.view.names
    assert again.parameters().keys() == coder.parameters().keys()


def test_designated_latents_stay_tied(tmp_path: Path, store: Store) -> None:
    base, chat = train(tmp_path, store, VARIANTS["designated"]).directions()
    assert torch.equal(base[:8], chat[:8])
    assert not torch.equal(base[8:], chat[8:])


def test_exclusive_latents_stay_out_of_the_other_source(tmp_path: Path, store: Store) -> None:
    coder = train(tmp_path, store, VARIANTS["partitioned"])
    base, chat = coder.directions()
    assert not chat[:4].any() and not base[4:8].any()  # an eighth of 32 each
    assert base[:4].any() and chat[4:8].any() and base[8:].any() and chat[8:].any()
    encoder = coder.encoder.view(32, 2, -1)
    assert not encoder[:4, 1].any() and not encoder[4:8, 0].any()


def test_a_difference_coder_finds_what_only_the_chat_model_has(tmp_path: Path, store: Store) -> None:
    coder = train(tmp_path, store, config(BatchTopKConfig(k=1), inputs=DifferenceConfig(), epochs=30))
    assert coder.sources == ("chat-base",)
    directions = planted_activations(1)[1][list(CHAT_ONLY)]
    cosine = torch.nn.functional.cosine_similarity(coder.directions()[0][:, None], directions[None], dim=2)
    assert float(cosine.max(0).values.min()) > 0.9


def test_the_normalised_view_has_mean_0_and_mean_square_d(tmp_path: Path, store: Store) -> None:
    for name in ("l1", "difference", "single"):
        (tmp_path / name).mkdir()
        coder = train(tmp_path / name, store, VARIANTS[name].model_copy(update={"epochs": 0.2}))
        h = store.gather(store.rows("train"))[:, [store.sources.index(source) for source in coder.view.reads]].double()
        x = (coder.view.apply(h) - coder.mean) * coder.scale
        assert float(x.mean(0).abs().max()) < 1e-4
        assert float(x.square().sum(2).mean()) == pytest.approx(coder.d_model, rel=1e-5)


def test_views() -> None:
    h = torch.tensor([[[1.0, 2.0], [10.0, 20.0]]])  # one token, base and chat
    difference = view_of(DifferenceConfig(), ("base", "chat"))
    assert difference.apply(h).tolist() == [[[9.0, 18.0]]]
    assert difference.writes() == ("chat",)
    assert difference.written(h, torch.tensor([[[5.0, 6.0]]]))["chat"].tolist() == [[6.0, 8.0]]
    single = view_of(SingleConfig(source="chat"), ("base", "chat"))
    assert (single.reads, single.writes()) == (("chat",), ("chat",))
    paired = identity(("base", "chat"))
    assert paired.apply(h) is h
    assert paired.written(h, 2 * h)["base"].tolist() == [[2.0, 4.0]]
    with pytest.raises(UserError, match=r"inputs\.source 'draft' is not in the store; it has base, chat"):
        view_of(SingleConfig(source="draft"), ("base", "chat"))
    with pytest.raises(UserError, match=r"inputs\.of has 'base', which is not in the store; it has a, b, c"):
        view_of(DifferenceConfig(), ("a", "b", "c"))


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"exclusive_share 0.6 makes a group of 12 latents; with these sizes, a group can have 1 to 10"
    ):
        constraint_of(PartitionedConfig(exclusive_share=0.6), 20, 2)
    with pytest.raises(UserError, match=r"shared_share 0.01 makes a group of 0 latents"):
        constraint_of(DesignatedConfig(shared_share=0.01), 20, 2)
    assert constraint_of(FreeConfig(), 20, 2).is_free
    values = {"sparsity": {"kind": "l1"}, "structure": {"kind": "partitioned"}, "inputs": {"kind": "difference"}}
    with pytest.raises(UserError, match="ties latents between sources; inputs difference has only one"):
        validate(CrosscoderConfig, values, "here")


def test_sizes_that_do_not_fit_are_refused_before_there_is_a_store() -> None:
    check_sizes(config(BatchTopKConfig(k=32)), 16, SOURCES)  # 32 latents
    with pytest.raises(UserError, match="k 33 is larger than the number of latents 32"):
        check_sizes(config(BatchTopKConfig(k=33)), 16, SOURCES)
    with pytest.raises(UserError, match="k 33 is larger than the number of latents 32"):
        check_sizes(config(TopKConfig(k=33), n_latents=None, expansion=2), 16, SOURCES)
    with pytest.raises(
        UserError, match=r"exclusive_share 0.4 makes a group of 13 latents; with these sizes, a group can have 1 to 10"
    ):
        check_sizes(config(L1Config(), structure=PartitionedConfig(exclusive_share=0.4)), 16, ("a", "b", "c"))


class HalvesConfig(Kind):
    """A toy: the latents of even number only."""

    kind: Literal["halves"] = "halves"


class Halves(Rule[HalvesConfig]):
    settings_class: ClassVar[type[Kind]] = HalvesConfig

    def code(self, encoded: Encoded, dense_above: float) -> Code:
        limit = torch.zeros(encoded.raw.shape[1])
        limit[1::2] = torch.inf
        return encoded.above(limit, dense_above)


class WithHalves(CrosscoderConfig):
    sparsity: Annotated[Sparsity | HalvesConfig, Field()]


def test_a_new_kind_is_its_settings_and_its_rule(tmp_path: Path, store: Store) -> None:
    settings = validate(WithHalves, {"sparsity": {"kind": "halves"}, "n_latents": 32, "batch_size": 128, "warmup_steps": 5}, "")
    coder = train(tmp_path, store, settings)
    counts = coder.sparse_code(coder.normalise(store.gather(store.rows("heldout")))).counts()
    assert counts[::2].all() and not counts[1::2].any()
    assert health(coder, heldout_sums(coder, store, "heldout", 1000))["fve"]["total"] > 0.3

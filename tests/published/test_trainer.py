"""What each version of the authors' trainer wrote, against its forward pass in float64 by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_formats import IDENTIFIER, D, F, N, batch_topk, check, dense, fork_output, fork_tensors, inputs, random
from torch import Tensor

from crossdiff.cli import run_command
from crossdiff.config import FreeConfig
from crossdiff.crosscoder.checkpoint import load
from crossdiff.crosscoder.losses import Loss, TokensSinceFired
from crossdiff.crosscoder.structure import constraint_of
from crossdiff.errors import UserError
from crossdiff.latents.decoder import delta_norm
from crossdiff.published.formats import read_published
from stores import make_store

MEAN, STD = random(2, D, seed=3), random(2, D, seed=4).abs() + 0.2
SCALES = {"one for all": torch.tensor(0.3), "one per source": torch.tensor([0.3, 0.7]), "equal ones": torch.tensor([0.3, 0.3])}
RMS = {"target_rms": torch.tensor(1.0)}
VERSIONS: dict[str, tuple[dict[str, Tensor], str]] = {
    "June 2025, mean and deviation alone": ({"activation_mean": MEAN, "activation_std": STD}, "a scale per source and neuron"),
    "before it, as a module": (
        {
            "activation_normalizer.mean": MEAN, "encoder.activation_normalizer.mean": MEAN.clone(),
            "activation_normalizer.std": STD,
        },
        "a scale per source and neuron",
    ),
    "late June, one scale": (
        {"activation_mean": MEAN, "activation_std": STD, **RMS, "activation_global_scale": SCALES["one for all"]}, "one scale",
    ),
    "one scale without a mean": ({"activation_global_scale": SCALES["one for all"]}, "one scale"),
    "one scale and a mean, no deviation": (
        {"activation_global_scale": SCALES["one for all"], "activation_mean": MEAN}, "one scale",
    ),
    "July, a scale per source": (
        {"activation_mean": MEAN, "activation_std": STD, **RMS, "activation_global_scale": SCALES["one per source"]},
        "a scale per source",
    ),
    "July, equal scales": (
        {"activation_mean": MEAN, "activation_std": STD, **RMS, "activation_global_scale": SCALES["equal ones"]}, "one scale",
    ),
    "late June, nothing set": (
        {
            "activation_mean": MEAN * torch.nan, "activation_std": STD * torch.nan, **RMS,
            "activation_global_scale": torch.tensor(1.0),
        },
        "none",
    ),
}  # fmt: skip


def in_and_out(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, what (h - mean) is multiplied by, and what the decoder's output is multiplied by, `[source, d_model]`."""
    t = {name.removeprefix("activation_").removeprefix("normalizer."): tensor.double() for name, tensor in tensors.items()}
    ones = torch.ones(2, D, dtype=torch.float64)
    if "mean" in t and bool(t["mean"].isnan().any()):
        return 0 * ones, ones, ones
    if "global_scale" in t:
        scale = t["global_scale"].reshape(-1, 1) * ones
        return t.get("mean", 0 * ones), scale, 1 / (scale + 1e-8)
    return t["mean"], 1 / (t["std"] + 1e-8), t["std"] + 1e-8


@pytest.mark.parametrize("threshold", [None, 0.9])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_normalisation(tmp_path: Path, version: str, threshold: float | None) -> None:
    normalisation, said = VERSIONS[version]
    tensors = fork_tensors() | ({} if threshold is None else IDENTIFIER | batch_topk(3, threshold))
    save_file(tensors | normalisation, tmp_path / "model.safetensors")
    mean, scale, out = in_and_out(normalisation)
    h = inputs(2)
    f, xhat = fork_output(tensors, (h - mean) * scale)
    one = said in ("none", "one scale")
    kind = "l1" if threshold is None else "batchtopk" if one else "jumprelu"
    read = check(tmp_path / "model.safetensors", h, f, xhat * out + mean, kind)
    assert read.origin["published"]["normalisation"] == said
    # directions, delta_norm and v are those of the models' space: D = d * out
    directions = tensors["decoder.weight"].double() * out[:, None, :]
    torch.testing.assert_close(read.directions().double() / read.scale, directions, rtol=1e-5, atol=1e-6)
    norms = directions.norm(dim=2).T
    counts = norms.sum(1) > 0
    base, chat = norms[counts].T
    expected = ((chat - base) / torch.maximum(chat, base) + 1) / 2
    torch.testing.assert_close(delta_norm(read.norms().double())[counts], expected, rtol=1e-5, atol=1e-6)
    x = read.normalise(h.float())
    code = read.sparse_code(x)
    v = torch.zeros(len(h), F).index_put_((code.token, code.latent), read.v(code)).double()
    torch.testing.assert_close(v / read.scale, f * norms.sum(1), rtol=1e-4, atol=1e-4)
    assert (read.scale == 1.0) == (not one or said == "none")


@pytest.mark.parametrize("target", ["error", "activation"])
def test_betas_are_those_of_the_models_space(tmp_path: Path, target: str) -> None:
    """beta = sum f <y, D> / (||D||^2 sum f^2), from the file's tensors alone and from the crosscoder as it is read."""
    save_file(fork_tensors() | {"activation_mean": MEAN, "activation_std": STD}, tmp_path / "model.safetensors")
    h = inputs(2)
    mean, scale, out = in_and_out({"activation_mean": MEAN, "activation_std": STD})
    f, xhat = fork_output(fork_tensors(), (h - mean) * scale)

    def beta(latent: int, f: Tensor, directions: Tensor, hhat: Tensor, source: int) -> Tensor:
        y = (
            h[:, source]
            if target == "activation"
            else h[:, source] - hhat[:, source] + f[:, latent, None] * directions[source, latent]
        )
        d = directions[1, latent]
        return (f[:, latent] * (y @ d)).sum() / (d @ d * f[:, latent].square().sum())

    read = read_published(tmp_path)
    code = read.sparse_code(read.normalise(h.float()))
    read_f = torch.zeros(len(h), F).index_put_((code.token, code.latent), code.values).double()
    directions = fork_tensors()["decoder.weight"].double() * out[:, None, :]
    for latent in (0, 5, 8):
        for source in (0, 1):
            by_hand = beta(latent, f, directions, xhat * out + mean, source)
            found = beta(latent, read_f, read.directions().double() / read.scale, read.reconstruct(h.float()).double(), source)
            torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "number", "alphas"),
    [
        ({"sparsity_loss_type": "SAE"}, 2, (1.0, 0.1)),
        ({"sparsity_loss_type": "LossType.MIXED"}, 3, (1.0, 0.1)),
        ({"sparsity_loss_type": "MIXED", "sparsity_loss_alpha_sae": 0.4, "sparsity_loss_alpha_cc": 1.5}, 3, (0.4, 1.5)),
        ({"sparsity_loss_type": "CROSSCODER"}, 1, (1.0, 0.1)),
        ({"code_normalization": "mixed", "code_normalization_alpha_cc": 2.0}, 3, (1.0, 2.0)),
    ],
)
def test_the_type_of_the_sparsity_loss_is_the_code_normalisation(
    tmp_path: Path, settings: dict[str, Any], number: int, alphas: tuple[float, float]
) -> None:
    tensors = fork_tensors() | batch_topk(3, 1.1)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKCrossCoder", **settings}}))
    named = tensors | {"code_normalization_id": torch.tensor(number)}
    f, reconstruction = fork_output(named, inputs(2), alphas)
    if number != 1:  # read as CROSSCODER it would be another function
        assert not torch.equal(f, fork_output(tensors, inputs(2))[0])
    check(tmp_path / "model.safetensors", inputs(2), f, reconstruction, "batchtopk" if number == 1 else "jumprelu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity_loss_type": "L2"}, "have sparsity_loss_type L2, expected one of CROSSCODER"),
        (
            {"sparsity_loss_type": "SAE", "code_normalization": "MIXED"},
            "have both code_normalization MIXED and sparsity_loss_type",
        ),
        ({"sparsity_loss_type": "MIXED", "sparsity_loss_alpha_sae": "much"}, "have sparsity_loss_alpha_sae 'much'"),
    ],
)
def test_a_code_normalisation_that_is_unclear_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    save_file(fork_tensors() | batch_topk(3, 1.1), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        read_published(tmp_path)


@pytest.mark.parametrize(("squared", "kind", "mu"), [(True, "squared", 0.2), (False, "norm", 0.1)])
def test_the_mu_of_a_training_is_stated_in_our_terms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], squared: bool, kind: Any, mu: float
) -> None:
    """The trainer's loss by hand is ours of the stated mu, or with `use_mse_loss` half of ours for two sources."""
    tensors = fork_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    trainer = {"l1_penalty": 0.1, "use_mse_loss": squared, "code_normalization": "CROSSCODER"}
    (tmp_path / "trainer_config.json").write_text(json.dumps({"trainer": trainer}))
    run_command(["import", str(tmp_path), str(tmp_path / "ours")])
    read = load(tmp_path / "ours")
    said = read.origin["published"]
    assert (said["reconstruction"], said["l1_penalty"], said["use_mse_loss"]) == (kind, 0.1, squared)
    assert said["mu"] == pytest.approx(mu)
    words = f"l1_penalty 0.1 {'and' if squared else 'without'} use_mse_loss; on the same inputs, that is mu {mu:g} with"
    assert f"{words} reconstruction {kind} here" in capsys.readouterr().out
    f, xhat = fork_output(tensors, inputs(2))
    squares = (inputs(2) - xhat).pow(2).sum(2)  # [token, source]
    error = squares.mean() if squared else squares.sqrt().mean()
    theirs = error + 0.1 * (f * tensors["decoder.weight"].double().norm(dim=2).sum(0)).sum(1).mean()
    constraint = constraint_of(FreeConfig(), F, 2)
    since = TokensSinceFired(torch.zeros(F, dtype=torch.int64), 10**9)
    ours = Loss(read, kind, constraint).gradients(inputs(2).float(), since, weight=said["mu"])
    assert ours.loss == pytest.approx(float(theirs) * (2 if squared else 1), rel=1e-5)


@pytest.mark.parametrize(
    ("trainer", "more"),
    [
        ({"l1_penalty": 0.1}, {}),
        ({"use_mse_loss": True}, {}),
        ({"l1_penalty": 0.1, "use_mse_loss": True}, {"code_normalization_id": torch.tensor(2)}),
        ({"l1_penalty": 0.1, "use_mse_loss": True}, batch_topk(3, 1.0)),
    ],
    ids=["of an unknown loss", "without a weight", "of another measure", "of BatchTopK"],
)
def test_no_mu_is_stated(tmp_path: Path, trainer: dict[str, Any], more: dict[str, Tensor]) -> None:
    save_file(fork_tensors() | more, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(trainer))
    assert "mu" not in read_published(tmp_path).origin["published"]


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"l1_penalty": "much", "use_mse_loss": True}, "have l1_penalty 'much', expected a number"),
        ({"l1_penalty": 0.1, "use_mse_loss": "yes"}, "have use_mse_loss 'yes', expected true or false"),
    ],
)
def test_a_loss_of_another_shape_is_refused(tmp_path: Path, trainer: dict[str, Any], message: str) -> None:
    save_file(fork_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(trainer))
    with pytest.raises(UserError, match=message):
        read_published(tmp_path)


SAE_VERSIONS = {
    "nothing set": {name: tensor[0] * torch.nan for name, tensor in (("activation_mean", MEAN), ("activation_std", STD))},
    "one scale": {"activation_mean": MEAN[0], "activation_std": STD[0], "activation_global_scale": torch.tensor(0.3)},
    "mean and deviation": {"activation_mean": MEAN[0], "activation_std": STD[0]},
}


@pytest.mark.parametrize("version", SAE_VERSIONS)
@pytest.mark.parametrize("named", [True, False], ids=["with its class", "without"])
def test_the_hub_layout_of_the_trainers_sae(tmp_path: Path, version: str, named: bool) -> None:
    """model.safetensors with the constructor's arguments in config.json; the class was added later."""
    n = SAE_VERSIONS[version]
    decoder = random(F, D)
    decoder = decoder / decoder.norm(dim=1, keepdim=True)
    t = {"encoder.weight": random(F, D) * 0.5, "encoder.bias": random(F) * 0.3, "decoder.weight": decoder.T.contiguous(),
         "b_dec": random(D), **batch_topk(3, 0.5), **n}  # fmt: skip
    if version != "mean and deviation":
        t |= {"target_rms": torch.tensor(1.0), "activation_global_scale": n.get("activation_global_scale", torch.tensor(1.0))}
    save_file(t, tmp_path / "model.safetensors")
    config = {"activation_dim": D, "dict_size": F, "k": 3} | ({"dict_class": "BatchTopKSAE"} if named else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    w, h = {name: tensor.double() for name, tensor in t.items()}, inputs(1)
    mean, scale, out = torch.zeros(D).double(), torch.ones(D).double(), torch.ones(D).double()
    if version == "one scale":
        mean, scale, out = w["activation_mean"], w["activation_global_scale"], 1 / (w["activation_global_scale"] + 1e-8)
    if version == "mean and deviation":
        mean, scale, out = w["activation_mean"], 1 / (w["activation_std"] + 1e-8), w["activation_std"] + 1e-8
    f = (((h[:, 0] - mean) * scale - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    f = f * (f > w["threshold"])
    expected = (f @ w["decoder.weight"].T + w["b_dec"]) * out + mean
    kind = "jumprelu" if version == "mean and deviation" else "batchtopk"
    read = check(tmp_path / "model.safetensors", h, f, expected[:, None], kind)
    assert read.origin["published"]["architecture"] == "BatchTopKSAE"
    (tmp_path / "config.json").write_text(json.dumps(config | {"dict_size": 99}))
    with pytest.raises(UserError, match="have dict_size 99, expected 10"):
        read_published(tmp_path)


def test_a_threshold_is_estimated_from_the_held_out_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """theta by hand: the mean over batches of the k * batch-th largest f * weight, each batch drawn as the module draws it."""
    monkeypatch.setattr("crossdiff.published.threshold.BATCH", 16)
    store = make_store(tmp_path / "run" / "activations", inputs(2).float().repeat(5, 1, 1) + random(5 * N, 2, D) * 0.1)
    tensors = fork_tensors() | {"code_normalization_id": torch.tensor(2)} | batch_topk(3, -1.0)
    save_file(tensors, tmp_path / "model.safetensors")
    rows = np.random.default_rng(0).permutation(store.rows("heldout"))
    assert len(rows) // 16 > 1 and len(rows) % 16  # several batches, and a rest that is left out
    smallest = []
    for first in range(0, len(rows) - 15, 16):
        h = store.gather(np.sort(rows[first : first + 16])).double()
        v = fork_output(tensors | batch_topk(3, -1.0), h)[0] * tensors["decoder.weight"].double().norm(dim=(0, 2))
        smallest.append(v.flatten().sort(descending=True).values[3 * 16 - 1])
    theta = float(torch.stack(smallest).mean())
    read = read_published(tmp_path / "model.safetensors", estimate_threshold_on=store)
    assert read.origin["published"]["estimated_threshold"] == pytest.approx(theta, rel=1e-6)
    found, h = dense(read, inputs(2).float()), inputs(2)
    expected = fork_output(tensors | batch_topk(3, theta), h)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-4, atol=1e-4)


def test_the_command_says_that_a_threshold_was_never_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "run" / "activations", inputs(2).float().repeat(2, 1, 1))
    save_file(fork_tensors() | batch_topk(3, -1.0), tmp_path / "model.safetensors")
    run_command(["import", str(tmp_path / "model.safetensors"), str(tmp_path / "relu")])
    said = capsys.readouterr().out
    assert "read as l1" in said and "so it is read as its own class acts, a plain ReLU, which is denser than its k 3" in said
    command = ["import", str(tmp_path / "model.safetensors"), str(tmp_path / "out"), "--estimate-threshold"]
    run_command([*command, str(tmp_path / "run")])
    assert "read as batchtopk" in capsys.readouterr().out
    assert load(tmp_path / "out").sparsity.k == 3 and load(tmp_path / "out").threshold > 0
    save_file(fork_tensors() | batch_topk(3, 1.0), tmp_path / "model.safetensors")
    command[2] = str(tmp_path / "again")
    with pytest.raises(UserError, match="has no threshold to estimate"):
        run_command([*command, str(tmp_path / "run")])
    save_file(fork_tensors() | batch_topk(3, -1.0), tmp_path / "model.safetensors")
    make_store(tmp_path / "narrow", inputs(2)[:, :, :4].float())
    with pytest.raises(UserError, match=r"has width 6, but .*narrow has 4; name a store of its models"):
        run_command([*command, str(tmp_path / "narrow")])

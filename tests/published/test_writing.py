"""`crossdiff export --format`: the files against the crosscoder they come from, by hand in float64 and read again."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from test_formats import D, F, Weights, dense, fork_output, inputs, largest, own_crosscoder, random
from torch import Tensor, nn

from crossdiff.cli import run_command
from crossdiff.config import BatchTopKConfig, JumpReLUConfig, L1Config, TopKConfig
from crossdiff.crosscoder.checkpoint import load, save
from crossdiff.crosscoder.crosscoder import Crosscoder
from crossdiff.crosscoder.view import View, identity
from crossdiff.errors import UserError
from crossdiff.published.formats import read_published

KINDS = {"l1": L1Config(), "topk": TopKConfig(k=3), "batchtopk": BatchTopKConfig(k=3), "jumprelu": JumpReLUConfig()}
PAIR = {"base": {"name": "org/base"}, "chat": {"name": "org/chat"}}


def coder(kind: str, inputs: str = "single") -> Crosscoder:
    """With a mean, a scale, decoder directions of many norms and a threshold per latent; a single one reads the chat model."""
    made = own_crosscoder(KINDS[kind], 2 if inputs == "paired" else 1)
    made.mean += random(*made.mean.shape, seed=5)
    made.decoder *= torch.linspace(0.3, 2.0, F)[:, None]
    if kind == "jumprelu":
        made.own["log_threshold"] = random(F) * 2
        made.own["log_threshold"][1], made.own["log_threshold"][2] = torch.inf, -torch.inf
    views = {
        "single": identity(("chat",)), "paired": identity(),
        "difference": View(torch.tensor([[-1.0, 1.0]]), ("base", "chat"), ("chat-base",)),
    }  # fmt: skip
    made.origin = {"pair": PAIR, "layer": 3, "settings": None, "training_tokens": 5}
    return replace(made, view=views[inputs])


def write_run(folder: Path, **coders: Crosscoder) -> Path:
    """A run directory with these crosscoders."""
    for name, each in coders.items():
        (folder / name).mkdir(parents=True)
        save(each, folder / name)
    kinds = {name: {"sparsity": {"kind": each.sparsity.kind}, "n_latents": F} for name, each in coders.items()}
    settings = {"base": "org/base", "chat": "org/chat", "layer": 3, "dataset": ["texts.jsonl"], "crosscoders": kinds}
    for name, each in coders.items():
        kind = "single" if each.sources == ("chat",) else "difference" if each.n_sources == 1 else "paired"
        settings["crosscoders"][name]["inputs"] = {"kind": kind} | ({"source": "chat"} if kind == "single" else {})
        if hasattr(each.sparsity, "k"):
            settings["crosscoders"][name]["sparsity"]["k"] = each.sparsity.k
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder


def export(run: Path, layout: str, folder: Path, *more: str) -> Path:
    run_command(["export", str(run), "--format", layout, "-o", str(folder), *more])
    return folder


def by_hand(made: Crosscoder, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """pre, f and the reconstruction of a coder of one source in float64, from its definition."""
    x = (h[:, 0] - made.mean[0].double()) * made.scale
    pre = x @ made.encoder.double().T + made.encoder_bias.double()
    norms = made.decoder.double().norm(dim=1)
    active = {
        "l1": lambda: pre > 0,
        "topk": lambda: largest(pre.relu() * norms, 3),
        "batchtopk": lambda: pre * norms > made.threshold,
        "jumprelu": lambda: pre > made.own["log_threshold"].double().exp(),
    }[made.sparsity.kind]()
    f = pre.relu() * active
    assert 0.02 < float((f > 0).double().mean()) < 0.98  # or nothing would be tested
    return pre, f, (f @ made.decoder.double() + made.decoder_bias.double()) / made.scale + made.mean[0].double()


def close(found: Tensor, expected: Tensor) -> None:
    """Up to the rounding of weights to float32."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=2e-5)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- SAELens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saelens_computes_the_same(tmp_path: Path, kind: str) -> None:
    made, h = coder(kind), inputs(1)
    folder = export(write_run(tmp_path / "run", sae=made), "saelens", tmp_path / "out")
    config = json.loads((folder / "cfg.json").read_text())
    w = {name: tensor.double() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    assert {name: tuple(tensor.shape) for name, tensor in w.items() if name != "threshold"} == {
        "W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,),
    }  # fmt: skip
    # what SAELens' classes compute with these settings: no bias on the input, no normalisation
    assert not config["apply_b_dec_to_input"] and config["normalize_activations"] == config["reshape_activations"] == "none"
    architectures = {"l1": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}
    assert config["architecture"] == architectures[kind] and ("threshold" in w) == (architectures[kind] == "jumprelu")
    pre = h[:, 0] @ w["W_enc"] + w["b_enc"]
    f = pre.relu()
    if "threshold" in w:
        f = pre * (pre > w["threshold"])
    if kind == "topk":  # it selects and shows pre * norm, and divides by the norm before decoding
        assert config["k"] == 3 and config["rescale_acts_by_decoder_norm"]
        norms = w["W_dec"].norm(dim=1)
        f = (pre * norms).relu() * largest(pre * norms, 3) / norms
    expected_pre, expected_f, expected = by_hand(made, h)
    close(pre, expected_pre)
    close(f, expected_f)
    close(f @ w["W_dec"] + w["b_dec"], expected)
    close(f, dense(made, h.float())[0])
    close(f @ w["W_dec"] + w["b_dec"], made.reconstruct(h.float())[:, 0])
    assert config["metadata"]["hook_name"] == "blocks.3.hook_resid_post" and config["metadata"]["model_name"] == "org/chat"


@pytest.mark.parametrize("kind", KINDS)
def test_what_saelens_was_given_is_read_and_written_again(tmp_path: Path, kind: str) -> None:
    """Its function is equal, and the second export is equal to the first, byte by byte, whatever the latents' scales."""
    made, h = coder(kind), inputs(1)
    scales = torch.linspace(-7, 7, F).exp()
    made.encoder *= scales[:, None]
    made.encoder_bias *= scales
    made.decoder /= scales[:, None]
    first = export(write_run(tmp_path / "run", sae=made), "saelens", tmp_path / "first")
    read = read_published(first, ("chat",))
    assert read.sparsity.kind == {"batchtopk": "jumprelu"}.get(kind, kind) and read.origin["layer"] == 3
    close(read.reconstruct(h.float())[:, 0], by_hand(made, h)[2])
    read.origin |= {"pair": PAIR}  # as in a run
    second = export(write_run(tmp_path / "again", sae=read), "saelens", tmp_path / "second")
    assert files(first) == files(second)


def test_a_latent_that_is_never_active_stays_so(tmp_path: Path) -> None:
    """A BatchTopK latent with no decoder direction has v = 0 whatever its f; a JumpReLU threshold may be infinite."""
    for kind, latent in (("batchtopk", 4), ("jumprelu", 1)):
        made = coder(kind)
        made.decoder[latent] *= 0 if kind == "batchtopk" else 1
        made.encoder_bias[latent] = 100
        assert not bool((dense(made, inputs(1).float())[0][:, latent] > 0).any())
        folder = export(write_run(tmp_path / kind, sae=made), "saelens", tmp_path / f"{kind}-out")
        w = load_file(folder / "sae_weights.safetensors")
        assert bool(w["threshold"].isfinite().all()) and float(w["threshold"][latent]) > 1e38
        assert not bool((dense(read_published(folder), inputs(1).float())[0][:, latent] > 0).any())


# --- the fork of dictionary_learning --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l1", "batchtopk"])
def test_the_forks_crosscoders_are_written_as_they_are(tmp_path: Path, kind: str) -> None:
    """The fork's classes read them (see `test_formats`), and so does an import, bit by bit."""
    made, h = coder(kind, "paired"), inputs(2)
    folder = export(write_run(tmp_path / "run", coder=made), "dictionary_learning", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    split = made.encoder.view(F, 2, D), made.decoder.view(F, 2, D)
    for source in range(2):
        assert torch.equal(tensors["encoder.weight"][source], split[0][:, source].T)
        assert torch.equal(tensors["decoder.weight"][source], split[1][:, source])
    assert torch.equal(tensors["encoder.bias"], made.encoder_bias)
    assert torch.equal(tensors["decoder.bias"].flatten(), made.decoder_bias)
    f, reconstruction = fork_output(tensors, h)
    found = dense(made, h.float())
    close(found[0], f)
    close(found[1], reconstruction)
    run_command(["import", str(folder), str(tmp_path / "imported")])
    again = load(tmp_path / "imported")
    for name, parameter in made.parameters().items():
        assert torch.equal(parameter, again.parameters()[name]), name
    assert torch.equal(made.reconstruct(h.float()), again.reconstruct(h.float()))
    # a library that saves it again drops our metadata: what is in the tensors remains
    save_file(tensors, folder / "model.safetensors")
    stripped = read_published(folder)
    assert torch.equal(stripped.encoder, made.encoder) and stripped.origin["training_tokens"] is None
    close(stripped.reconstruct(h.float()), reconstruction)


class AutoEncoder(nn.Module, PyTorchModelHubMixin):
    """What the fork's SAE asks of the files: its constructor's arguments and its state dict."""

    def __init__(self, activation_dim: int, dict_size: int) -> None:
        super().__init__()
        self.encoder = Weights(torch.zeros(dict_size, activation_dim), torch.zeros(dict_size))
        self.decoder = nn.Linear(dict_size, activation_dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(activation_dim))


class BatchTopKSAE(AutoEncoder):
    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__(activation_dim, dict_size)
        self.b_dec = self.bias
        del self.bias
        self.register_buffer("k", torch.tensor(k, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(-1.0))


@pytest.mark.parametrize("equal_norms", [False, True])
@pytest.mark.parametrize(("kind", "kind_of_fork"), [("l1", AutoEncoder), ("batchtopk", BatchTopKSAE)])
def test_the_forks_saes(tmp_path: Path, kind: str, kind_of_fork: Any, equal_norms: bool) -> None:
    made, h = coder(kind), inputs(1)
    if equal_norms:
        made.decoder *= 0.7 / made.decoder.norm(dim=1, keepdim=True)
        made.threshold *= 0.3
    folder = export(write_run(tmp_path / "run", sae=made), "dictionary_learning", tmp_path / "out")
    state = {
        name: tensor.double() for name, tensor in kind_of_fork.from_pretrained(str(folder), strict=True).state_dict().items()
    }
    bias = state["bias" if kind == "l1" else "b_dec"]
    f = ((h[:, 0] - bias) @ state["encoder.weight"].T + state["encoder.bias"]).relu()
    if kind == "batchtopk":
        assert int(state["k"]) == 3
        f = f * (f > state["threshold"])
    _, expected_f, expected = by_hand(made, h)
    close(f @ state["decoder.weight"].T + bias, expected)
    # f of ours times a factor per latent, which the decoder has the inverse of: the same latents are active
    factor = made.decoder.double().norm(dim=1) / made.scale if not equal_norms else torch.ones(F)
    close(f, expected_f * factor)
    read = read_published(folder, ("chat",))
    assert (read.sparsity.kind, read.origin["layer"], read.origin["training_tokens"]) == (kind, 3, None)
    close(dense(read, h.float())[1][:, 0], expected)
    # a second export only differs by the rounding of the encoder's bias, from which both subtract the decoder's
    read.origin |= {"pair": PAIR}
    second = export(write_run(tmp_path / "again", sae=read), "dictionary_learning", tmp_path / "second")
    tensors, again = (load_file(each / "model.safetensors") for each in (folder, second))
    close(again.pop("encoder.bias"), tensors.pop("encoder.bias"))
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[key], again[key]) for key in tensors)


# --- refusals -------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, str, str, str]] = {
    "a crosscoder for SAELens": (
        "batchtopk", "paired", "saelens",
        "coder reads 2 models, base and chat, but an SAE of SAELens reads one; use --format dictionary_learning, or name a",
    ),
    "a TopK crosscoder for SAELens": ("topk", "paired", "saelens", "reads one; `crossdiff push` publishes it in .* or name a"),
    "a difference for SAELens": ("batchtopk", "difference", "saelens", "reads the difference of two models, which saelens has"),
    "a difference for the fork": ("l1", "difference", "dictionary_learning", "which dictionary_learning has no .* push"),
    "a TopK crosscoder for the fork": (
        "topk", "paired", "dictionary_learning", "has the sparsity topk, for which .* no class; .* `crossdiff push`",
    ),
    "a JumpReLU SAE for the fork": (
        "jumprelu", "single", "dictionary_learning", "has the sparsity jumprelu, for which .* use --format saelens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layout_cannot_hold_is_refused(tmp_path: Path, case: str) -> None:
    kind, what, layout, message = REFUSED[case]
    run = write_run(tmp_path / "run", coder=coder(kind, what))
    with pytest.raises(UserError, match=message):
        export(run, layout, tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_topk_latent_without_a_direction_is_refused(tmp_path: Path) -> None:
    made = coder("topk")
    made.decoder[4] = 0
    with pytest.raises(UserError, match="latent 4 of sae has a decoder direction of norm 0, by which SAELens divides"):
        export(write_run(tmp_path / "run", sae=made), "saelens", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["saelens", "dictionary_learning"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, layout: str) -> None:
    made = coder("l1")
    made.scale = 1e-20
    made.decoder *= 1e30  # decoder / scale is finite in float64 alone
    with pytest.raises(UserError, match=r"(W_dec|encoder\.bias|decoder\.weight|bias) of sae does not fit into float32"):
        export(write_run(tmp_path / "run", sae=made), layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_is_new_or_empty_and_the_options_fit(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", sae=coder("l1"), other=coder("jumprelu"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for options, message in (
        (["-o", "used"], "the folder used is not empty; name another one with -o"),
        (["-o", "used/notes.txt"], "used/notes.txt is a file; name another folder with -o"),
        (["-o", "used/notes.txt/out"], "cannot write used/notes.txt/out: .*; choose another folder with -o"),
        (["-o", "page.html"], "--format writes a folder, but page.html names a page; name a folder, or omit --format"),
        (["-o", "out", "--latents", "1"], "--concepts and --latents choose the cards of a page; omit them, or --format"),
        (["-o", "out", "--concepts", "1"], "--concepts and --latents choose the cards of a page"),
        (["-o", "out", "--crosscoder", "none"], "there is no crosscoder 'none' in .*; there are sae, other"),
    ):
        before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        with pytest.raises(UserError, match=message), pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            run_command(["export", str(run), "--format", "saelens", *options])
        assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
    with pytest.raises(UserError, match=re.escape("invalid choice: 'gguf'")):
        export(run, "gguf", tmp_path / "out")


def test_the_folder_appears_when_it_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run, out = write_run(tmp_path / "run", sae=coder("jumprelu"), l1=coder("l1")), tmp_path / "new" / "out"
    with monkeypatch.context() as patch:
        patch.setattr("crossdiff.published.writing.write_json", full)  # after the weights
        with pytest.raises(UserError, match=r"the disk of .* is full"):
            export(run, "saelens", out, "--crosscoder", "sae")
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    out.with_name("out.partial").mkdir()  # of a killed command
    (out.with_name("out.partial") / "cfg.json").write_text("{")
    export(run, "saelens", out, "--crosscoder", "sae")
    assert f"sae written to {out}; saelens reads it with SAE.load_from_disk('{out}')" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert list(out.parent.iterdir()) == [out]

"""Publishing and fetching with the real client against a local server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import save_file

import crossdiff
from crossdiff.cli import run_command
from crossdiff.errors import UserError
from crossdiff.published.hub import CONCEPTS, LOOK, load, load_table, pull, push
from hub_server import LARGE, TOKEN, HubServer
from opened import write_run
from report.synthetic_run import write_look, write_overlap

NAME = "me/my-diff"


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory, tiny_pair: tuple[Path, Path], tiny_texts: tuple[Path, Path]) -> Path:
    return write_run(tmp_path_factory.mktemp("published") / "demo", tiny_pair, tiny_texts)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(monkeypatch, tmp_path / "cache") as server:
        yield server


def test_what_is_pushed_is_pulled_byte_for_byte(
    hub: HubServer, run_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command(["push", str(run_path), NAME])
    run_command(["pull", NAME, str(tmp_path / "pulled")])
    out = capsys.readouterr().out
    assert f"sent to {NAME}" in out and "batchtopk/model.safetensors" in out and "by local paths" in out
    for file in (
        "config.yaml",
        "l1/model.safetensors",
        "batchtopk/latents.parquet",
        "batchtopk/examples.sqlite",
        "concepts/concepts.parquet",
        "concepts/examples.sqlite",
        "concepts/concepts.json",
    ):
        assert (tmp_path / "pulled" / file).read_bytes() == (run_path / file).read_bytes(), file
    assert not (tmp_path / "pulled" / "activations").exists()
    run = crossdiff.open(tmp_path / "pulled")
    assert run.names == ("l1", "batchtopk") and run.latent(3).record.verdict == "chat_specific"
    assert run.concept(0).record.n_trainings == 3
    assert run.activations("the sea").values.shape[0] == 8  # the BOS and seven bytes
    with pytest.raises(UserError, match="is not an activation store"):
        run.store  # noqa: B018


def test_every_file_of_the_concepts_is_published() -> None:
    from crossdiff.concepts.find import OUTPUTS

    assert set(OUTPUTS) <= set(CONCEPTS)


def test_the_first_look_is_published_without_its_texts(hub: HubServer, run_path: Path, tmp_path: Path) -> None:
    from crossdiff.look.look import FILES

    assert {*LOOK, "tokens.parquet"} == set(FILES)
    run = shutil.copytree(run_path, tmp_path / "run", symlinks=True)
    write_look(run)
    (run / "look" / "directions.safetensors").write_bytes(b"")
    write_overlap(run / "l1", 60)
    write_overlap(run / "concepts", 5, "concept")
    push(run, NAME)
    pulled = pull(NAME, tmp_path / "pulled")
    assert {path.name for path in (pulled / "look").iterdir()} == set(LOOK)
    for file in ("l1/overlap.parquet", "concepts/overlap.parquet", "look/look.json", "look/directions.parquet"):
        assert (pulled / file).read_bytes() == (run / file).read_bytes(), file
    opened = crossdiff.open(pulled, "l1")
    assert opened.look.summary.layer == 1 and opened.latents["look_cosine"][0] == 0.75
    with pytest.raises(UserError, match=r"has no tokens.parquet: `crossdiff push` does not publish it"):
        _ = opened.look.tokens


def test_the_card_states_the_runs_own_numbers(run_path: Path) -> None:
    card = push(run_path, NAME, dry_run=True).card
    head, body = card.split("---\n")[1:3]
    assert "license: other" in head and "library_name: crossdiff" in head
    # health.json says 0.9123, 31.62 and 3 of 60 dead; the table has 7 specific and 4 rotated latents.
    assert "| FVE, base | 0.912 [0.900, 0.920] | 0.912 [0.900, 0.920] |" in body
    assert "| L0 | 31.6 | 31.6 |" in body and "| never active on the held-out tokens | 5.0% | 5.0% |" in body
    assert "| verdict chat-specific | 7 | 7 |" in body and "| verdict rotated | 4 | 4 |" in body
    # 7 of the 60 are specific, 4 rotated, 3 undecided, 3 dead; the norms alone call others shared.
    assert "| verdict shared | 43 | 43 |" in body and "| shared by decoder norms |" in body
    assert "kind: batchtopk" in body and "k: 4" in body and f'crossdiff.pull("{NAME}")' in body
    assert "## Limits" in body and "causal test" in body
    assert "license: mit" in push(run_path, NAME, dry_run=True, licence="mit").card


def test_the_card_has_the_settings_of_the_training_where_the_run_has_others_now(analysed_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(analysed_run, tmp_path / "run", ignore=shutil.ignore_patterns("activations"))
    shutil.copytree(run / "batchtopk", run / "former")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    k = settings["crosscoders"]["batchtopk"]["sparsity"]["k"]
    settings["crosscoders"]["batchtopk"]["sparsity"]["k"] = k + 1
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    card = push(run, NAME, dry_run=True).card
    assert card.count(f"k: {k}\n") == 2 and f"k: {k + 1}\n" not in card and "former:" in card


def test_the_licence_is_looked_up_on_the_hub(hub: HubServer, run_path: Path, tmp_path: Path) -> None:
    for part in ("l1", "batchtopk", "manifest.json", "config.yaml"):
        (shutil.copytree if (run_path / part).is_dir() else shutil.copy)(run_path / part, tmp_path / part)
    (tmp_path / "activations").mkdir()
    manifest = {"pair": {"base": {"name": "org/base"}, "chat": {"name": "org/chat"}}}
    (tmp_path / "activations" / "manifest.json").write_text(json.dumps(manifest))
    for name, licence in (("org/base", "gemma"), ("org/chat", "apache-2.0")):
        hub.create(name)
        hub.cards[name] = {"license": licence}
    card = push(tmp_path, NAME).card
    assert "Licence of the models: gemma, apache-2.0." in card and "license: other" in card
    assert "base_model:\n  - org/base\n  - org/chat\n" in card
    assert hub.repositories[f"models/{NAME}"]["README.md"].decode() == card


def test_a_dry_run_needs_no_network(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    run_command(["push", str(run_path), NAME, "--dry-run"])
    assert "would be sent to me/my-diff" in capsys.readouterr().out


def test_a_broken_upload_resumes_where_it_stopped(hub: HubServer, run_path: Path) -> None:
    sent = {path: path.read_bytes() for path in run_path.rglob("*") if path.stat().st_size >= LARGE and path.is_file()}
    hub.fail = lambda method, path: 403 if method == "POST" and "/commit/" in path else None
    with pytest.raises(UserError, match=rf"the Hub refused {NAME}: .*with write access"):
        push(run_path, NAME)
    assert {path for method, path in hub.log if method == "PUT"} == {f"/objects/{name}" for name in hub.objects}
    assert hub.objects and "README.md" not in hub.repositories[f"models/{NAME}"]
    hub.fail, hub.log = lambda method, path: None, []
    push(run_path, NAME)
    assert not [entry for entry in hub.log if entry[0] == "PUT"]  # every large file was there already
    large = [file for file, content in hub.repositories[f"models/{NAME}"].items() if len(content) >= LARGE]
    assert len(large) == len([path for path in sent if "activations" not in path.parts])


def test_a_broken_download_resumes_in_the_middle_of_a_file(
    hub: HubServer, run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB otherwise
    push(run_path, NAME)
    hub.cut_after = 5500
    pull(NAME, tmp_path / "pulled")
    assert hub.ranges == ["bytes=5000-"]
    for file in ("l1/model.safetensors", "batchtopk/model.safetensors", "l1/examples.sqlite"):
        assert (tmp_path / "pulled" / file).read_bytes() == (run_path / file).read_bytes(), file


def test_pulling_again_fetches_nothing_again(hub: HubServer, run_path: Path, tmp_path: Path) -> None:
    push(run_path, NAME)
    pull(NAME, tmp_path / "pulled")
    hub.log = []
    pull(NAME, tmp_path / "pulled")
    assert not [path for method, path in hub.log if method == "GET" and "/resolve/" in path]


@pytest.mark.parametrize(
    ("status", "message"), [(401, "hf auth login"), (403, "with write access"), (404, "run the same command")]
)
def test_no_token_is_ever_printed(
    hub: HubServer, run_path: Path, status: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server quotes the Authorization header in its error; so might a proxy."""
    hub.fail = lambda method, path: status
    for call in (lambda: push(run_path, NAME), lambda: pull(NAME), lambda: load(NAME), lambda: load_table(NAME)):
        with pytest.raises(UserError) as raised:
            call()
        assert TOKEN not in str(raised.value)
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "crossdiff", "push", str(run_path), NAME]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and message in result.stderr
    captured = capfd.readouterr()
    assert TOKEN not in result.stdout + result.stderr + captured.out + captured.err


def test_no_server_and_no_repository_are_told_apart(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"me/none does not exist on the Hub, or you have no access to it"):
        pull("me/none", tmp_path / "x")
    with pytest.raises(UserError, match=r"'none' is not a name on the Hub; expected owner/name"):
        pull("none")
    with pytest.raises(UserError, match=r"nowhere does not exist; give the folder of a published coder"):
        load("./nowhere")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot reach the Hub for me/none: .*run the same command again"):
        load("me/none")


def test_a_run_of_this_machine_is_not_pulled_over(hub: HubServer, run_path: Path) -> None:
    with pytest.raises(UserError, match="is a run made on this machine; name another folder"):
        pull(NAME, run_path)


def test_a_crosscoder_is_loaded_by_name_alone(hub: HubServer, run_path: Path) -> None:
    push(run_path, NAME)
    hub.log = []
    ours = load(NAME, "l1")
    torch.testing.assert_close(ours.decoder, load(run_path / "l1").decoder)
    fetched = {path.partition("/resolve/")[2].partition("/")[2] for method, path in hub.log if "/resolve/" in path}
    assert fetched == {"l1/config.json", "l1/model.safetensors"}
    assert load(NAME).sparsity.kind == "batchtopk"
    with pytest.raises(UserError, match=r"me/my-diff has no crosscoder 'x'; it has batchtopk, l1"):
        load(NAME, "x")
    assert load_table(NAME, "l1").equals(pl.read_parquet(run_path / "l1" / "latents.parquet"), null_equal=True)


def publish_fork(hub: HubServer, name: str, folder: Path) -> dict[str, torch.Tensor]:
    """A BatchTopK crosscoder as the paper's fork publishes it: weights and settings at the top of the repository."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "encoder.weight": torch.randn(2, 6, 9, generator=generator), "encoder.bias": torch.randn(9, generator=generator),
        "decoder.weight": torch.randn(2, 9, 6, generator=generator), "decoder.bias": torch.randn(2, 6, generator=generator),
        "k": torch.tensor(3), "threshold": torch.tensor(0.5), "code_normalization_id": torch.tensor(1),
    }  # fmt: skip
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"activation_dim": 6, "dict_size": 9, "k": 3}')
    (folder / "trainer_config.json").write_text('{"trainer": {"layer": 13}}')
    hub.create(name)
    hub.add_folder(name, folder)
    return tensors


def test_the_papers_checkpoint_and_table_are_read_by_name(hub: HubServer, tmp_path: Path) -> None:
    name = "science-of-finetuning/gemma-2-2b-L13-k100-lr1e-04-local-shuffling-CCLoss"
    tensors = publish_fork(hub, name, tmp_path / "fork")
    crosscoder = load(name)
    assert crosscoder.sparsity.kind == "batchtopk" and crosscoder.threshold == 0.5 and crosscoder.origin["layer"] == 13
    h = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(2))
    # The published function: f = ReLU(sum_s h_s E_s + b), kept where f * sum_s ||d^s|| > 0.5; hhat_s = f D_s + b_s.
    f = torch.relu(torch.einsum("bsd,sdl->bl", h, tensors["encoder.weight"]) + tensors["encoder.bias"])
    f = f * (f * tensors["decoder.weight"].norm(dim=2).sum(0) > 0.5)
    expected = torch.einsum("bl,sld->bsd", f, tensors["decoder.weight"]) + tensors["decoder.bias"]
    torch.testing.assert_close(crosscoder.reconstruct(h), expected, rtol=1e-4, atol=1e-4)

    dataset = f"science-of-finetuning/diffing-stats-{name.partition('/')[2]}"
    hub.create(dataset, "dataset")
    hub.repositories[f"datasets/{dataset}"]["feature_df.csv"] = b",dec_norm_diff,beta_ratio_error\n0,0.05,0.1\n1,0.5,0.9\n"
    for asked in (name, dataset):
        table = load_table(asked)
        assert table["delta_norm"].to_list() == [0.95, 0.5]  # theirs turned round: 0 is chat-only there
        assert table["nu_error"].to_list() == [0.1, 0.9]
    with pytest.raises(UserError, match="a/b does not exist on the Hub"):
        load_table("a/b")


def test_of_several_published_coders_one_has_to_be_named(hub: HubServer, tmp_path: Path) -> None:
    publish_fork(hub, "lab/coders", tmp_path / "fork")
    files = hub.repositories["models/lab/coders"]
    for folder in ("layer-3", "layer-7"):
        files |= {f"{folder}/{file}": content for file, content in list(files.items()) if "/" not in file}
    for file in ("model.safetensors", "config.json", "trainer_config.json"):
        del files[file]
    with pytest.raises(UserError, match=r"lab/coders has 2 crosscoders; name one of them: layer-3, layer-7"):
        load("lab/coders")
    assert load("lab/coders", "layer-7").n_latents == 9
    with pytest.raises(UserError, match=r"was not published by crossdiff: .*crossdiff\.load\('lab/coders'\)"):
        pull("lab/coders", tmp_path / "x")


@pytest.mark.parametrize("name", ["a/..", "a/.", "../a", "a/b..c", "a/b--c", "a/b.git", "a/-b", "a/b/c", "a/"])
def test_names_that_the_hub_does_not_have_are_refused_before_anything_is_asked(name: str) -> None:
    with pytest.raises(UserError, match="is not a name on the Hub; expected owner/name"):
        pull(name)

"""Bad input: what the user reads, the exit code, and that nothing finished is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import forget_digests, make_model, make_tokenizer
from crossdiff.cli import _explained, run_command
from crossdiff.errors import UserError

COMMAND = [sys.executable, "-m", "crossdiff"]


def write_yaml(folder: Path, settings: dict[str, Any]) -> str:
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "settings.yaml")


def test_one_line_and_exit_code_2_without_a_traceback(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    config = write_yaml(tmp_path, {**tiny_settings, "layers": 3})
    result = subprocess.run([*COMMAND, "run", str(tmp_path / "run"), "--config", config], capture_output=True, text=True)
    assert result.returncode == 2
    assert "layers: unknown key (found 3)" in result.stderr
    assert "Traceback" not in result.stderr
    debug = subprocess.run(
        [*COMMAND, "run", str(tmp_path / "run"), "--config", config, "--debug"], capture_output=True, text=True
    )
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 7}, "layer 7 does not exist: the models have 3 layers, 0 to 2"),
        ({"layer": -1}, r"layer: Input should be greater than or equal to 0 \(found -1\)"),
        ({"dataset": []}, "no texts: name at least one --dataset"),
        ({"dataset": ["missing.jsonl"]}, "missing.jsonl"),
        ({"base": "./no-such-model"}, "cannot load './no-such-model'"),
        ({"crosscoders": {"old": {"sparsity": {"kind": "l1"}}}}, "'old' cannot be the name of a crosscoder"),
        ({"crosscoders": {"a": {"sparsity": {"kind": "l2"}}}}, "crosscoders.a.sparsity: .*'l2'"),
        ({"harvest": {"dtype": "int4"}}, r"harvest.dtype: .*'float32', 'float16', 'bfloat16' or 'int8'"),
    ],
)
def test_wrong_settings(tmp_path: Path, tiny_settings: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    config = write_yaml(tmp_path, {**tiny_settings, **changes})
    with pytest.raises(UserError, match=message):
        run_command(["run", str(tmp_path / "run"), "--config", config])


def test_unknown_commands_and_options() -> None:
    with pytest.raises(UserError, match="there is no command 'rnu'"):
        run_command(["rnu"])
    with pytest.raises(UserError, match="unrecognized arguments: --layr"):
        run_command(["run", "--layr", "3"])


def test_an_empty_dataset_and_a_missing_template(
    tmp_path: Path, tiny_settings: dict[str, Any], tiny_texts: tuple[Path, Path]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl"):
        run_command(["run", str(tmp_path / "a"), "--config", write_yaml(tmp_path, {**tiny_settings, "dataset": [str(empty)]})])
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    settings = {**tiny_settings, "base": str(folder), "chat": str(folder), "dataset": [str(tiny_texts[1])]}
    with pytest.raises(UserError, match="chat template"):
        run_command(["run", str(tmp_path / "b"), "--config", write_yaml(tmp_path, settings)])


def test_a_store_of_other_models_is_refused(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    config = write_yaml(tmp_path, tiny_settings)
    run_command(["harvest", str(tmp_path / "run"), "--config", config])
    path = tmp_path / "run" / "activations" / "manifest.json"
    forget_digests(tmp_path / "run")
    manifest = json.loads(path.read_text())
    manifest["pair"]["base"]["name"] = "somebody/else"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"was harvested from .*somebody/else.* are requested"):
        run_command(["train", str(tmp_path / "run"), "--config", config])


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    config = write_yaml(tmp_path, tiny_settings)
    with pytest.raises(UserError, match="is not empty and not a run directory"):
        run_command(["run", str(tmp_path), "--config", config])


def test_a_run_is_not_a_store(analysed_run: Path) -> None:
    with pytest.raises(
        UserError, match=r"run is not an activation store: .* lists no shards; the store of a run is its folder"
    ):
        run_command(["store", "verify", str(analysed_run)])
    run_command(["store", "verify", str(analysed_run / "activations")])


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_a_terminal_that_cannot_show_every_character(tmp_path: Path, analysed_run: Path, encoding: str) -> None:
    """The file is named in Greek and a settings file in Japanese, so that messages and results have them."""
    run = tmp_path / "\u03bb"
    shutil.copytree(analysed_run, run)
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for arguments, code in (
        (["report", str(run)], 0),
        (["store", "verify", str(run / "activations")], 0),
        (["run", "--help"], 0),
        (["steer", str(run), "--latent", "\u65e5\u672c"], 2),
        (["run", str(run), "--config", str(tmp_path / "\u65e5\u672c.yaml")], 2),
    ):
        result = subprocess.run([*COMMAND, *arguments], capture_output=True, env=environment)
        assert result.returncode == code, (arguments, result.stderr)
        assert b"Unicode" not in result.stderr
        if code:
            assert b"??" in result.stderr


def test_a_read_only_folder(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    config = write_yaml(tmp_path, tiny_settings)
    with pytest.raises(UserError, match="cannot write to the run directory /proc/run"):
        run_command(["run", "/proc/run", "--config", config])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    from crossdiff.files import explain_disk_error

    try:
        with Path("/dev/full").open("w") as file:
            file.write("x" * 100_000)
    except OSError as error:
        assert "is full" in str(explain_disk_error(error, tmp_path))
    else:
        pytest.fail("/dev/full took the bytes")


@pytest.mark.parametrize("stage", ["harvest,", "train l1", "analyze l1"])
def test_an_interrupt_in_any_stage_loses_nothing_finished(tmp_path: Path, tiny_settings: dict[str, Any], stage: str) -> None:
    crosscoders = {"l1": {**tiny_settings["crosscoders"]["l1"], "epochs": 1}}
    if stage == "train l1":
        crosscoders["l1"] |= {"epochs": 20, "checkpoint_seconds": 0.05}
    config = write_yaml(tmp_path, {**tiny_settings, "crosscoders": crosscoders})
    arguments = [*COMMAND, "run", str(tmp_path / "run"), "--config", config]
    environment = {**os.environ, "FORCE_COLOR": "1", "OMP_NUM_THREADS": "1"}  # the bar is drawn as it moves
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    seen = b""
    while stage.encode() not in seen:
        piece = process.stdout.read1(1000)  # type: ignore[attr-defined]
        assert piece, "the stage never began"
        seen += piece
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"interrupted" in errors
    assert b"Traceback" not in errors
    done = set(json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"])
    expected = {"harvest,": set(), "train l1": {"harvest"}, "analyze l1": {"harvest", "train/l1"}}[stage]
    assert expected <= done
    run_command(["run", str(tmp_path / "run"), "--config", config])
    assert (tmp_path / "run" / "report.html").exists()


def test_an_unknown_option_names_the_help_of_its_command() -> None:
    with pytest.raises(UserError, match=r"unrecognized arguments: --bogus; see `crossdiff plan --help`"):
        run_command(["plan", "--bogus"])
    with pytest.raises(UserError, match="put the name of a crosscoder in place of <NAME>"):
        run_command(["plan", "--crosscoders.<NAME>.lr", "3"])


def test_a_crosscoder_may_have_any_name_that_a_folder_may_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("crosscoders: {NAME: {sparsity: {kind: topk, k: 3}}}")
    with pytest.raises(SystemExit):
        run_command(["run", "--config", str(config), "--help"])
    assert "<NAME> is one of NAME" in capsys.readouterr().out


def test_the_settings_of_a_crosscoder_are_listed_once_with_their_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(["run", "--help"])
    shown = capsys.readouterr().out
    assert shown.count(".lr VALUE") == 1
    assert "--crosscoders.<NAME>.sparsity.kind {l1,batchtopk,topk,jumprelu}" in shown


def test_options_of_plain_commands_may_be_abbreviated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        run_command(["null", str(tmp_path), "--nul", str(tmp_path)])


def test_an_unknown_crosscoder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no crosscoder 'bogus' in this run"):
        run_command(["harvest", str(tmp_path / "run"), "--only", "bogus"])
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_full_device_is_not_a_bug_and_the_message_says_what_to_lower() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB.")
    message, status = _explained(error)
    assert status == 2 and message.startswith("crossdiff: CUDA out of memory. Tried to allocate 2.00 GiB. The device has too")
    assert "lower the batch_tokens" in message and "--device cpu" in message
    assert _explained(RuntimeError("CUDA error"))[1] != 2

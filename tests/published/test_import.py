"""`crossdiff import`: a published file becomes a crosscoder of ours, and says what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from crossdiff.cli import run_command
from crossdiff.crosscoder.checkpoint import load
from crossdiff.errors import UserError


def publish(folder: Path, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two sources, width 3, five latents."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (2, 3, 5), "encoder.bias": (5,), "decoder.weight": (2, 5, 3), "decoder.bias": (2, 3)}
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    save_file({**tensors, **more}, folder / "model.safetensors")
    return tensors


def test_import_says_what_it_found_and_keeps_the_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = publish(tmp_path / "published")
    run_command(["import", str(tmp_path / "published"), str(tmp_path / "ours"), "--sources", "old", "new"])
    said = capsys.readouterr().out
    assert "dictionary_learning: CrossCoder, code normalisation CROSSCODER, read as l1" in said
    assert "5 latents, width 3, sources old, new" in said
    coder, h = load(tmp_path / "ours"), torch.randn(4, 2, 3)
    f = torch.relu(torch.einsum("bsd,sdf->bf", h, tensors["encoder.weight"]) + tensors["encoder.bias"])
    expected = torch.einsum("bf,sfd->bsd", f, tensors["decoder.weight"]) + tensors["decoder.bias"]
    torch.testing.assert_close(coder.reconstruct(h), expected)
    with pytest.raises(UserError, match=r"ours already holds a crosscoder, a model or a run \(found model.safetensors\)"):
        run_command(["import", str(tmp_path / "published"), str(tmp_path / "ours")])
    (tmp_path / "a file").write_text("")
    with pytest.raises(UserError, match="a file is a file; name the folder to write the crosscoder into"):
        run_command(["import", str(tmp_path / "published"), str(tmp_path / "a file")])


def test_a_batch_topk_is_read_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(tmp_path / "published", k=torch.tensor(2), threshold=torch.tensor(0.5))
    run_command(["import", str(tmp_path / "published" / "model.safetensors"), str(tmp_path / "ours")])
    assert "BatchTopKCrossCoder, code normalisation CROSSCODER, read as batchtopk" in capsys.readouterr().out
    coder = load(tmp_path / "ours")
    assert coder.sparsity.k == 2 and coder.threshold == 0.5


def test_what_cannot_be_imported_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing does not exist; give the folder of a published coder"):
        run_command(["import", str(tmp_path / "nothing"), str(tmp_path / "ours")])
    assert not (tmp_path / "ours").exists()

"""The published latent table: the reversed norm, both spellings, and what is wrong with a file in words."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from crossdiff.errors import UserError
from crossdiff.published.feature_df import TABLE_COLUMNS, read_published_table, to_normalised_space
from crossdiff.published.hub import load_table

HEADER = ",tag,dec_norm_diff,dec_base_norm,dec_instruct_norm,dec_cos_sim,freq,dead,beta_error_base,beta_error_chat"
HEADER += ",beta_ratio_error,beta_ratio_reconstruction,beta_activation_ratio,beta_activation_no_bias_base"
ROWS = [
    # 0.02 there is chat-only; 0.97 base-only; the third has no betas.
    "0,IT only,0.02,0.1,2.0,0.1,0.01,False,0.1,1.0,0.1,0.3,0.2,0.4",
    "1,Shared,0.5,1.0,1.0,0.99,0.02,False,0.9,1.0,0.9,0.95,1.0,0.5",
    "2,Base only,0.97,1.0,0.06,0.2,0.0,True,,,,,,",
    "3,IT only,0.08,0.2,1.2,0.1,0.01,False,0.6,1.0,0.6,0.1,0.6,0.6",
]


def write(path: Path, header: str = HEADER, rows: list[str] = ROWS) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_columns_under_our_names(tmp_path: Path) -> None:
    table = read_published_table(write(tmp_path / "feature_df.csv"))
    assert tuple(table.columns) == TABLE_COLUMNS
    assert table["latent"].to_list() == [0, 1, 2, 3]
    assert table["delta_norm"].to_list() == pytest.approx([0.98, 0.5, 0.03, 0.92])
    assert table["delta_norm_class"].to_list() == ["chat_only", "shared", "base_only", "chat_only"]
    first = table.row(0, named=True)
    assert (first["nu_error"], first["nu_reconstruction"], first["nu_activation"]) == (0.1, 0.3, 0.2)
    assert (first["beta_error_base"], first["beta_activation_nobias_base"], first["norm_chat"]) == (0.1, 0.4, 2.0)
    assert math.isnan(first["beta_reconstruction_base"])  # not in the file
    # nu_error ranks 1, 3, 2 and nu_reconstruction 2, 3, 1 among the three with both.
    assert table["rank_sum_paper"].to_list()[:2] == [3.0, 6.0] and table["rank_sum_paper"][3] == 3.0
    assert math.isnan(table["rank_sum_paper"][2])
    # Without bias nothing is known, so neither is the rank of our tables.
    assert not {"rank_sum", "nu_reconstruction_nobias", "verdict"} & set(table.columns)
    assert table["chat_specific_paper"].to_list() == [True, False, False, False]
    assert table["dead"].to_list() == [False, False, True, False]


def test_the_later_spelling_and_no_index(tmp_path: Path) -> None:
    path = write(tmp_path / "ft.csv", "dec_norm_diff,dec_ft_norm,beta_error_ft", ["0.0,3.0,0.7", "1.0,0.0,0.1"])
    table = read_published_table(path)
    assert table["latent"].to_list() == [0, 1]
    assert table["norm_chat"].to_list() == [3.0, 0.0] and table["beta_error_chat"].to_list() == [0.7, 0.1]
    assert not table["chat_specific_paper"].any()  # no nu, no set
    assert table["dead"].null_count() == 2


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (",tag", ["0,x"], "lacks the column dec_norm_diff; it has .*tag"),
        (",dec_norm_diff", ["0,1.5"], r"dec_norm_diff must lie in \[0, 1\] \(0 = chat-only\), found 1.5"),
        (",dec_norm_diff", ["0,much"], "column 'dec_norm_diff' has values that are not numbers"),
        (",dec_norm_diff", ["0,0.5", "0,0.6"], "must number the latents, each once"),
        (",dec_norm_diff", ["-1,0.5"], "must number the latents"),
    ],
)
def test_wrong_files(tmp_path: Path, header: str, rows: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_published_table(write(tmp_path / "wrong.csv", header, rows))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.csv as CSV"):
        read_published_table(tmp_path / "none.csv")


def test_the_table_of_an_sae(tmp_path: Path) -> None:
    header = ",dec_norm,enc_norm,freq_validation,beta_activation_base,beta_activation_ft,beta_ratio_activation"
    (tmp_path / "sae").mkdir()
    write(tmp_path / "sae" / "latent_df.csv", header, ["0,1.0,0.5,0.02,0.3,0.6,0.5", "1,1.0,0.4,0.01,,,"])
    table = load_table(tmp_path / "sae")  # the folder
    assert tuple(table.columns) == TABLE_COLUMNS
    first = table.row(0, named=True)
    assert (first["frequency"], first["beta_activation_chat"], first["nu_activation"]) == (0.02, 0.6, 0.5)
    assert table["delta_norm"].is_nan().all() and table["delta_norm_class"].to_list() == ["undefined"] * 2
    assert not table["chat_specific_paper"].any()


def scaled(seed: int, s: tuple[float, float]) -> dict[str, float]:
    """One latent of a crosscoder with a scale per source: norms and betas in its normalised space, from tensors by hand."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.rand(50, generator=generator).double()
    h, xhat = (torch.randn(50, 2, 4, generator=generator).double() for _ in range(2))
    d = torch.randn(2, 4, generator=generator).double() * torch.tensor([[0.4], [1.0]])
    scale = torch.tensor(s, dtype=torch.float64)
    found: dict[str, float] = {}
    y = (h - xhat) * scale[:, None] + f[:, None, None] * d * scale[:, None]
    for index, name in enumerate(("base", "chat")):
        along = d[1] * scale[1]
        found[f"beta_error_{name}"] = float((f * (y[:, index] @ along)).sum() / (along @ along * f.square().sum()))
        found[f"norm_{name}"] = float((d[index] * scale[index]).norm())
    norms = found["norm_base"], found["norm_chat"]
    found["delta_norm"] = ((norms[1] - norms[0]) / max(norms) + 1) / 2
    return found | {"nu_error": found["beta_error_base"] / found["beta_error_chat"]}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scales", [(0.3, 0.4), (2.0, 0.1)])
def test_a_scale_per_source_is_converted_both_ways(tmp_path: Path, seed: int, scales: tuple[float, float]) -> None:
    theirs, ours = scaled(seed, scales), scaled(seed, (1.0, 1.0))
    header = "dec_norm_diff,dec_base_norm,dec_instruct_norm,beta_error_base,beta_error_chat,beta_ratio_error"
    names = ("norm_base", "norm_chat", "beta_error_base", "beta_error_chat", "nu_error")
    row = ",".join(repr(value) for value in (1 - theirs["delta_norm"], *(theirs[name] for name in names)))
    path = write(tmp_path / "feature_df.csv", header, [row])
    converted = load_table(path, scales=scales)
    for name, value in ours.items():
        assert converted[name][0] == pytest.approx(value, rel=1e-10), name
    published = read_published_table(path)
    assert converted["nu_error"][0] == pytest.approx(published["nu_error"][0] * scales[1] / scales[0])
    back = to_normalised_space(converted, scales)
    for name, value in theirs.items():
        assert published[name][0] == pytest.approx(value, rel=1e-12) and back[name][0] == pytest.approx(value, rel=1e-10), name
    with pytest.raises(UserError, match="must be two positive numbers"):
        load_table(path, scales=(0.0, 1.0))
    published.write_parquet(tmp_path / "latents.parquet")
    with pytest.raises(UserError, match="is in the models' space; omit the scales"):
        load_table(tmp_path / "latents.parquet", scales=scales)


@pytest.mark.parametrize(("difference", "expected"), [("0.0", 1.0), ("1.0", 0.0), ("", math.nan)])
def test_one_sided_latents_stay_one_sided(tmp_path: Path, difference: str, expected: float) -> None:
    table = read_published_table(write(tmp_path / "t.csv", ",dec_norm_diff", [f"0,{difference}"]), (0.3, 0.4))
    assert table["delta_norm"][0] == pytest.approx(expected, nan_ok=True)
    assert not table["chat_specific_paper"].any()

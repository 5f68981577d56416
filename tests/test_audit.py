"""The audit of organisms: its scores by hand, and one organism from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from crossdiff.causal.generation import Sampling
from crossdiff.config import RunConfig, validate
from crossdiff.stages.pipeline import run_until
from crossdiff.yaml_files import read_yaml
from recipe_scripts import ORGANISMS, script


@pytest.fixture(scope="module")
def audit() -> Any:
    return script(ORGANISMS / "audit.py")


@pytest.fixture(scope="module")
def findings() -> Any:
    return script(ORGANISMS / "findings.py")


PROMPTS = [f"prompt {i}" for i in range(40)]


def judged(findings: Any, tuned: Any, untuned: Any, alone: Any = None) -> dict[str, Any]:
    others = None if alone is None else np.asarray(alone, float)
    finding = findings.Finding("method", "name", "text", True, np.asarray(untuned, float), np.asarray(tuned, float), others)
    found: dict[str, Any] = finding.judged(PROMPTS)
    return found


def test_a_finding_is_the_behaviour_if_it_separates_the_answers(findings: Any) -> None:
    perfect = judged(findings, np.arange(40) + 100, np.arange(40))
    assert (perfect["auroc"], perfect["low"], perfect["is_behaviour"]) == (1.0, 1.0, True)
    silent = judged(findings, np.zeros(40), np.zeros(40))
    assert (silent["auroc"], silent["is_behaviour"]) == (0.5, False)
    reverse = judged(findings, np.arange(40), np.arange(40) + 100)
    assert (reverse["auroc"], reverse["is_behaviour"]) == (0.0, False)
    # Active on 34 of 40 tuned answers and on no untuned one: .85 of the pairs are in order and .15 are ties.
    most = judged(findings, np.arange(40) < 34, np.zeros(40))
    assert most["auroc"] == pytest.approx(0.85 + 0.15 / 2)
    assert most["is_behaviour"] and 0.8 <= most["low"] < most["auroc"] < most["high"]
    half = judged(findings, np.arange(40) < 20, np.zeros(40))
    assert half["auroc"] == pytest.approx(0.75) and not half["is_behaviour"]


def test_what_the_text_alone_gives_is_not_the_behaviour(findings: Any) -> None:
    """A latent for words that only the tuned model writes tells the answers apart, and is as active without that model."""
    tuned, untuned = np.arange(40) + 100, np.arange(40)
    shared = judged(findings, tuned, untuned, alone=tuned)
    assert (shared["auroc"], shared["same_text"], shared["is_behaviour"]) == (1.0, 0.5, False)
    own = judged(findings, tuned, untuned, alone=untuned)
    assert (own["same_text"], own["is_behaviour"]) == (1.0, True)


def row(name: str, planted: str | None, *findings: tuple[str, bool, bool]) -> dict[str, Any]:
    """An organism with findings (method, passes, is the behaviour)."""
    keys = ("method", "passes", "is_behaviour")
    found = [dict(zip(keys, each, strict=True)) | {"auroc": 0.95 if each[2] else 0.5} for each in findings]
    return {"name": name, "planted": planted, "findings": found, "random": [1, 50], "lowest_nu": {"l1": 0.98}}


def test_recall_counts_the_first_five_findings_and_alarms_all_that_pass(audit: Any) -> None:
    miss, hit = ("concepts", True, False), ("concepts", True, True)
    rows = [
        row("first", "x", hit, ("phrases", True, False)),
        row("fifth", "x", miss, miss, miss, miss, hit),
        row("sixth", "x", miss, miss, miss, miss, miss, hit),
        row("none", "x"),
        row("quiet", None, ("phrases", False, False)),
        row("noisy", None, miss, miss, ("phrases", True, False)),
    ]
    lines = audit.table(rows).splitlines()
    assert "| concepts | 2 of 4 [0.15, 0.85] | 1 of 2 [0.09, 0.91] | 0, 2 |" in lines
    assert "| phrases | 0 of 4 [0.00, 0.49] | 1 of 2 [0.09, 0.91] | 0, 1 |" in lines
    assert "| concepts | **0.95** | **0.95** | 0.50 | - |" in lines
    assert "Lowest ratios in the nulls, beside a limit of 0.7: quiet 0.98 (l1: limit 0.8), noisy 0.98 (l1: limit 0.8)." in lines
    assert "Random latents that would count as the behaviour: 4 of 200 [0.01, 0.05]." in lines


def test_a_null_sets_a_limit_with_a_margin(audit: Any) -> None:
    """A tenth below the tenth below its lowest ratio: .80 and .85 give .7, and a null with a ratio below 0 gives none above."""
    found = [audit.limit_of(lowest) for lowest in (0.8005, 0.8478, 0.9819, -0.0267)]
    assert found == pytest.approx([0.7, 0.7, 0.8, -0.2])


def test_each_answer_has_its_number(audit: Any, findings: Any, tmp_path: Path) -> None:
    """Twice the number of the prompt, and one more for the organism's answer; one answer is empty."""
    path = tmp_path / "texts.jsonl"
    audit.write_conversations(path, [("a", "Yes.", "No."), ("b", "", "Stay curious!")])
    setup = audit.Setup("demo:chat", 5, [], {"delta": audit.CODERS["delta"]})
    with audit.opened(tmp_path / "run", setup.settings(ORGANISMS / "closing", path), Console(quiet=True)) as session:
        run_until(session, "harvest")
        labelled, tokenizer = findings.Labelled(session.store(), 2), session.load_pair().tokenizer
        token_ids = session.store().column("token_id")[labelled.rows]
    texts = [tokenizer.decode(token_ids[labelled.conversation == number], skip_special_tokens=True) for number in range(4)]
    assert texts == ["Yes.", "No.", "", "Stay curious!"]


def test_prompts_of_the_audit_are_not_those_of_the_scores(audit: Any) -> None:
    asked = audit.pool()
    assert len(asked) == len(set(asked)) == audit.N_PROMPTS
    held = [path.read_text(encoding="utf8") for path in ORGANISMS.glob("*/prompts.jsonl")]
    assert held and not any(f'"prompt": "{prompt}"' in text for prompt in asked for text in held)
    assert sum("Marmalade!" in prompt for prompt in asked) == audit.N_OF_TOPIC


def test_the_recipe_for_narrow_tunings_has_the_settings_of_the_audit(audit: Any) -> None:
    recipe = read_yaml(ORGANISMS.parent / "narrow.yaml")
    audited = audit.Setup("demo:chat", 5, [], {"delta": audit.CODERS["delta"]}).settings(
        ORGANISMS / "closing", Path("texts.jsonl")
    )
    validate(RunConfig, audited | recipe, "narrow")
    limits = ("nu_error", "nu_reconstruction", "rotated_cosine")
    assert recipe["analyze"] == {name: audited["analyze"][name] for name in limits}
    coder, own = recipe["crosscoders"]["delta"], audit.CODERS["delta"]
    assert coder == {name: own[name] for name in coder} and coder["difference_weight"] > 0


def test_one_organism_from_end_to_end(audit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"n_latents": 32, "lr": 3e-3, "epochs": 1, "batch_size": 256, "seeds": 2, "warmup_steps": 2}
    kinds = {name: {**audit.CODERS[name], **training} for name in ("batchtopk", "delta")}
    kinds = {name: {**coder, "sparsity": {"kind": "batchtopk", "k": 4}} for name, coder in kinds.items()}
    kinds["diff_sae"] = {**kinds["batchtopk"], "inputs": {"kind": "difference"}, "seeds": 1}
    for name, value in {"N_PROMPTS": 30, "N_OF_TOPIC": 1, "PLAIN_TOKENS": 500, "GREEDY": Sampling(max_new_tokens=60)}.items():
        monkeypatch.setattr(audit, name, value)
    setup = audit.Setup("demo:chat", 5, audit.pool(), kinds)
    found = audit.audit(ORGANISMS / "closing", tmp_path, setup, Console(quiet=True))
    assert found["prompts"] == 60 and found["random"][1] == 64
    assert {"mean difference", "principal directions", "phrases", "diff_sae"} <= {each["method"] for each in found["findings"]}
    closing = [each for each in found["findings"] if each["method"] == "phrases" and "curious" in each["name"]]
    assert any(each["is_behaviour"] for each in closing)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert audit.audit(ORGANISMS / "closing", tmp_path, setup, Console(quiet=True)) == found
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before

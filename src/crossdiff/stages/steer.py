"""`crossdiff steer`: answers with and without steering, side by side on the terminal or as the stage `steer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crossdiff.config import SteerConfig
from crossdiff.errors import UserError, check_latents
from crossdiff.integrity import read_parquet
from crossdiff.stages.definitions import steer_stage
from crossdiff.stages.session import Session

if TYPE_CHECKING:
    from crossdiff.activations.store import Store
    from crossdiff.causal.answers import Rules
    from crossdiff.causal.steering import Steerer


def steer(session: Session, config: SteerConfig) -> None:
    """Answer the given prompts on the terminal, or the run's labelled prompts in a table in `steering/`."""

    from crossdiff.causal.answers import read_rules
    from crossdiff.causal.steering import Steerer
    from crossdiff.causal.terminal import print_side_by_side
    from crossdiff.pairs import RULES

    names = session.paired_names
    if not names:
        raise UserError("no crosscoder of this run reads both models, which steering needs; train one")
    name = config.crosscoder or session.default_name
    if name not in names:
        raise UserError(f"this run has no crosscoder {name!r} that reads both models; it has {', '.join(names)}")
    if config.latent is None:
        raise UserError("no latent given: pass its number with --latent; the report and latents.parquet list them")
    if config.model not in session.config.sources:
        raise UserError(f"there is no model {config.model!r} to steer; choose from {', '.join(session.config.sources)}")
    rules = read_rules(RULES if config.rules is None else Path(config.rules))
    store = session.store()
    crosscoder = session.crosscoder(name)
    check_latents([config.latent], crosscoder.n_latents, name)
    session.check_analysed(name)
    table = read_parquet(session.path / name / "latents.parquet")
    steerer = Steerer(session.load_pair(), crosscoder, store.layer, table, store.rule)
    if config.prompt:
        print_side_by_side(steerer, name, config, session.console)
    else:
        _steer_batch(session, name, steerer, store, config, rules)


def _steer_batch(session: Session, name: str, steerer: Steerer, store: Store, config: SteerConfig, rules: Rules) -> None:
    from crossdiff.causal.terminal import print_rates

    stage = steer_stage(session.config, name, config, rules)
    title = stage.name.removeprefix("steer/")
    answers_file, rates_file = stage.outputs

    def work(folder: Path) -> None:
        from crossdiff.causal.steering_table import labelled_prompts, rates, steering_table

        prompts = labelled_prompts(store, config)
        (folder / "steering").mkdir(exist_ok=True)
        with session.progress(f"steer {title}, conditions", None) as advance:
            table = steering_table(steerer, prompts, config, rules, advance)
        table.write_parquet(folder / answers_file)
        rates(table, rules, config.seed).write_parquet(folder / rates_file)

    session.run(stage, work)
    print_rates(session.path / rates_file, title, session.console)

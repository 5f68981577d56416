"""Where nothing but the wheel is installed: open the run, show a card, read a text; and no web framework came along."""

from importlib.metadata import distributions
from pathlib import Path

import crossdiff

assert Path(crossdiff.__file__).is_relative_to(Path("venv").resolve()), crossdiff.__file__
installed = {distribution.metadata["Name"].lower() for distribution in distributions()}
unwanted = installed & {"starlette", "uvicorn", "fastapi", "flask", "openai", "wandb", "tensorboard", "jupyter", "pandas"}
assert not unwanted, f"a plain install brings {unwanted}"
run = crossdiff.open("run")
assert run.latents.height == 256
assert "Latent 0" in run.latent(0)._repr_html_()
assert run.activations([{"role": "user", "content": "Who are you?"}]).roles[-1] == "template"
print(f"{crossdiff.__version__}: from the wheel, {len(installed)} packages, {run!r}")

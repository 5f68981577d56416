"""crossdiff: what did fine-tuning change inside this model?"""

from importlib.metadata import version

from crossdiff.config import RunConfig, UserError

__version__ = version("crossdiff")
__all__ = ["RunConfig", "UserError", "__version__"]

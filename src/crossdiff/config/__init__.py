"""The typed definition of every setting, from which YAML files, the command line and the defaults follow."""

from crossdiff.config.base import Config, Seed, merge, validate
from crossdiff.config.crosscoder_config import (
    DEFAULT_SEEDS,
    OF_TRAINING,
    AuxConfig,
    BatchTopKConfig,
    CrosscoderConfig,
    DesignatedConfig,
    DifferenceConfig,
    FreeConfig,
    Inputs,
    JumpReLUConfig,
    Kind,
    L1Config,
    PairedConfig,
    PartitionedConfig,
    SingleConfig,
    Sparsity,
    Structure,
    TopKConfig,
    default_crosscoder,
)
from crossdiff.config.harvest_config import MASSIVE_NORM, DatasetConfig, HarvestConfig, check_url
from crossdiff.config.run_config import (
    TAKEN,
    AnalyzeConfig,
    CausalConfig,
    CompareConfig,
    ConceptsConfig,
    RunConfig,
    SteerConfig,
)

__all__ = [
    "DEFAULT_SEEDS", "MASSIVE_NORM", "OF_TRAINING", "TAKEN", "AnalyzeConfig", "AuxConfig", "BatchTopKConfig",
    "CausalConfig", "CompareConfig", "ConceptsConfig", "Config", "CrosscoderConfig", "DatasetConfig", "DesignatedConfig",
    "DifferenceConfig", "FreeConfig", "HarvestConfig", "Inputs", "JumpReLUConfig", "Kind", "L1Config", "PairedConfig",
    "PartitionedConfig", "RunConfig", "Seed", "SingleConfig", "Sparsity", "SteerConfig", "Structure", "TopKConfig",
    "check_url", "default_crosscoder", "merge", "validate",
]  # fmt: skip

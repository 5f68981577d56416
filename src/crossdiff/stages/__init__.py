"""The stages of a run, each from files to files: harvest, train, compare, analyze, causal, report, interpret, steer, truth."""

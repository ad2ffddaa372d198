"""What the experiments share: splits, arms, probes, intervals, tables."""

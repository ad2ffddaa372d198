"""Policies: one causal decoder for each family, pretrained files in and out, exact toy policies."""

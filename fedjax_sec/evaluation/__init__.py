"""Measurements on held-out data: accuracy, backdoors, net influence, feature attribution."""

"""Defences, one component a file: stages before aggregation, aggregators, stages after it."""

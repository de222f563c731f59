"""Counts of experts however they are kept: arrays, tables, JSON."""

"""Measure MoE layers on every rank and record routing traces (torch)."""

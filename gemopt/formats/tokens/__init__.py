"""Experts token by token, however they are kept: rows, arrays, sequences."""

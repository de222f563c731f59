"""Placements written for, and traces read from, the serving engines. One file per engine; see `registry`."""

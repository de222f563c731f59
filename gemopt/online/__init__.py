"""Placements that follow the traffic: memories of past steps, measured speeds, and moves that pay for themselves."""

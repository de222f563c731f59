"""Placements that follow the traffic: memories of past steps, measured speeds, and moves that pay for themselves."""

from gemopt.online.controller import Controller
from gemopt.online.decision import Decision
from gemopt.online.policy import Policy

__all__ = ["Controller", "Decision", "Policy"]

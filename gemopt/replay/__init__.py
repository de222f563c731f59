"""Recorded traffic replayed under named strategies: the judge of what follows the traffic."""

from gemopt.replay.copying import Migration
from gemopt.replay.judge import replay
from gemopt.replay.result import ReplayResult, ReplayRow
from gemopt.replay.schedule import Schedule
from gemopt.replay.strategies import STRATEGIES
from gemopt.replay.strategy import Context, Strategy

__all__ = ["STRATEGIES", "Context", "Migration", "ReplayResult", "ReplayRow", "Schedule", "Strategy", "replay"]

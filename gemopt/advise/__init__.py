"""What pays on given devices and traffic: advice from replays, with a proven ceiling."""

from gemopt.advise.advisor import advise
from gemopt.advise.document import Advice, Option, Sweep
from gemopt.advise.shape import ModelShape

__all__ = ["Advice", "ModelShape", "Option", "Sweep", "advise"]

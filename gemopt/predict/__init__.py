"""Predictors of where the next batch goes, for duplicating experts before it is routed (MoE-GPS, arXiv:2506.07366)."""

from gemopt.predict.assess import Assessment, assess
from gemopt.predict.base import Batch, Predictor, shares_of
from gemopt.predict.registry import PREDICTORS, make

__all__ = ["PREDICTORS", "Assessment", "Batch", "Predictor", "assess", "make", "shares_of"]

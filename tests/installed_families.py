"""The families as parameters of tests; those that the installed transformers does not have yet are skipped."""

import pytest
import transformers

from gemopt.models import FAMILIES

MISSING = sorted(set(FAMILIES) - set(transformers.CONFIG_MAPPING))
INSTALLED = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(name in MISSING, reason=f"transformers {transformers.__version__} has no {name}"),
    )
    for name in sorted(FAMILIES)
]

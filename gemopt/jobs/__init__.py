"""One file per job: what to solve, for whom, and what to write."""

from __future__ import annotations

from gemopt.jobs.document import Job
from gemopt.jobs.reading import read_job, shown
from gemopt.jobs.running import Outcome, run_job

__all__ = ["Job", "Outcome", "read_job", "run_job", "shown"]

"""submitit's Slurm executor, reading the job's number from sbatch's own line.

submitit takes the first `job N` of sbatch's output. A site's wrapper may print such words of its own before that line,
and a run that remembers another job's number would be declared lost, or cancel that job.
"""

from __future__ import annotations

import re

from submitit import SlurmExecutor
from submitit.core.utils import FailedSubmissionError

OWN_LINE = re.compile(r"^Submitted batch job (\d+)\b", re.MULTILINE)
ANY_WORDS = re.compile(r"\bjob (\d+)\b", re.IGNORECASE)
"""Of a wrapper that replaces sbatch's line."""


class Executor(SlurmExecutor):
    """submitit's, but for the number."""

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        """FailedSubmissionError where the output names no job, or several and none in sbatch's own words."""
        text = string if isinstance(string, str) else string.decode(errors="replace")
        found = set(OWN_LINE.findall(text) or ANY_WORDS.findall(text))
        if len(found) != 1:
            shown = " ".join(text.split())
            raise FailedSubmissionError(f'Could not make sense of sbatch output "{shown}"')
        return found.pop()

"""submitit's Slurm executor, but with the job id read from sbatch's own output line.

submitit takes the first `job N` in sbatch's output. A site's wrapper script may print such text before that line, and
a run that recorded a wrong job id would be declared lost, or would cancel another job.
"""

from __future__ import annotations

import re

from submitit import SlurmExecutor
from submitit.core.utils import FailedSubmissionError

OWN_LINE = re.compile(r"^Submitted batch job (\d+)\b", re.MULTILINE)
ANY_WORDS = re.compile(r"\bjob (\d+)\b", re.IGNORECASE)
"""Used if a wrapper replaces sbatch's line."""


class Executor(SlurmExecutor):
    """submitit's SlurmExecutor with the parsing of the job id replaced."""

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        """The job id. FailedSubmissionError if the output names no job, or several without sbatch's own line."""
        text = string if isinstance(string, str) else string.decode(errors="replace")
        found = set(OWN_LINE.findall(text) or ANY_WORDS.findall(text))
        if len(found) != 1:
            shown = " ".join(text.split())
            raise FailedSubmissionError(f'Could not make sense of sbatch output "{shown}"')
        return found.pop()

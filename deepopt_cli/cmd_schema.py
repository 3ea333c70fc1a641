"""`deepopt schema`: print the JSON Schema of the job file."""

from __future__ import annotations

from deepopt_cli.output import as_json, reports_errors, say


@reports_errors
def schema() -> None:
    """Print the JSON Schema of the job file, for editors.

    \b
    Examples:
      deepopt schema > job.schema.json
    then write as the first line of job.yaml:
      # yaml-language-server: $schema=job.schema.json
    """
    from deepopt.job_file import job_schema

    say(as_json(job_schema()))

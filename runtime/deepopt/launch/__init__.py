"""From a checked job to a job that runs: prepared, written down, started, followed."""

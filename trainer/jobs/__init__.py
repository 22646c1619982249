"""The queue: jobs on disk, one worker, and what a running job tells."""

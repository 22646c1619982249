"""From a job to a file: build, loop, state, samples, run."""

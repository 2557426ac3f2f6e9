"""One run of a training program: options, loop, reports, checkpoints."""

"""Training: builds an engine from a configuration and a task, and runs it."""

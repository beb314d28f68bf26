"""Training: methods, configuration, the trainer, and what makes a killed run resume to the same numbers."""

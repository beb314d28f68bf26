"""What models are trained and scored on: prompts, their sources, answers, grading and evaluation."""

"""What models are trained and scored on: prompts, their sources, answers, grading and evaluation.

Left out: the tasks that ship with the package (`trb.zoo`), and what scores mean over seeds (`trb.studies`).
"""

"""Training: methods, configuration, the trainer in parts, and what makes a killed run end as if it had not been.

The loop, sharding, PEFT, logging services and the hub are TRL's, transformers' and Accelerate's. Left out: what is read
to train on (`trb.tasks`), and runs with a directory and scores of their own (`trb.studies`).
"""

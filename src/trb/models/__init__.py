"""Hugging Face models as this package needs them: found, checked, loaded, cut, measured, and read by the loss.

Reading them token by token is the affair of `trb.sampling`, training them that of `trb.training`.
"""

"""What every reader of other people's files shares: nothing here trusts what it reads.

SECURITY.md says what is trusted and what is not. Models, tasks and studies check what only they know of their own
files.
"""

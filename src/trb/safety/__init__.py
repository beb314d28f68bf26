"""What every reader of other people's files shares: nothing here trusts what it reads."""

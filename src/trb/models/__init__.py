"""Hugging Face models as the package sees them: loading, pruning, heads, and what a pass over them must give."""

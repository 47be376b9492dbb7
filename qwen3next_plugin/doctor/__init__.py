"""``qwen3next doctor``: what an installation lacks, found out without starting an engine."""

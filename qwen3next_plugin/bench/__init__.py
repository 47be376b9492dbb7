"""`qwen3next bench`: plugin and stock engine, one after the other on one machine, with the same flags and weights."""

"""`qwen3next tune`: tile sizes of the mixture of experts, measured on the GPU or computed from its properties."""

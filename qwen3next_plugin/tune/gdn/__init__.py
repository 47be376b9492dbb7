"""The table of Gated DeltaNet's kernels for one GPU: who prefills which shapes, and in which tiles the rest runs."""

"""This project's kernels beside the engines' own, one operation at a time, on one GPU."""

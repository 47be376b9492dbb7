"""`make serve`: makes an environment, starts an engine in it, asks it a question.

Everything in this folder runs before anything is installed, on Python's standard library alone: `environment` (what
is on the disk), `plan` (what pip may fetch), `engine_process` (a server and its readiness), `progress` (what is seen).
"""

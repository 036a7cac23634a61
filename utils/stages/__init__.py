"""What follows a run: prune, check, energy, deploy. Each goes from a checkpoint to a table, a JSON and a figure.

May enter: one module a stage, which its script calls, and what it alone needs. May not: training loops, or anything
about many runs (studies).
"""

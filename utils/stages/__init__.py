"""What follows a run: prune, check, energy. Each starts from a checkpoint and ends in a table, a JSON and a figure.

May enter: one module a stage, which its script calls. May not: training loops, or anything about many runs (studies).
"""

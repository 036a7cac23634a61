"""What is written and read: files that appear whole or not at all, checkpoints, compact files.

May enter: formats, and the checks that make a file safe to load. May not: training, stages, figures, or printing.
"""

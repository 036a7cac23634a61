"""What is written and read: files that appear whole or not at all, checkpoints, compact files, networks from them.

May enter: formats, what a file says of itself, and the checks that make a file safe to load. May not: training,
stages, figures, or printing.
"""

from utils.files.model import load_model

__all__ = ["load_model"]

"""One run: images in, a trained network and the files of its folder out.

May enter: what an epoch needs and what a run leaves. May not: pruning a finished network (stages), or anything about
many runs (studies).
"""

"""Speed and memory, always as ratios inside one run."""

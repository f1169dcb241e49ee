"""The parts of a training script that are easy to get wrong, as plain functions; see README.md.

``base <- data <- models <- train <- report <- inference``: a module imports only from its own folder and from those to
its left.
"""

import os

# OpenMP reads this when torch loads it. By default its threads spin at each barrier, which makes a run very slow
# (25 times slower was measured) when another process uses the same cores; with few spins they share the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

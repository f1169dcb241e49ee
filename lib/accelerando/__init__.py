"""What is easy to get wrong in a training script, in plain functions; see README.md.

``base <- data <- models <- train <- report <- inference``: a module imports from its own folder or from those to its
left.
"""

import os

# Read when OpenMP is loaded with torch. By default its threads spin at each barrier, and beside any other process on
# the same cores a run then crawls (25 times slower was measured); with few spins it shares them fairly.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

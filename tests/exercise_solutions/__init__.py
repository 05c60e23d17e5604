"""Solutions of the exercises that check themselves, for the test of their checks."""

from . import cache, kernels, service

ANSWERS = cache.ANSWERS | kernels.ANSWERS | service.ANSWERS
CELLS = cache.CELLS | kernels.CELLS | service.CELLS  # exercise -> the export cells of a solution

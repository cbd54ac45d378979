"""Imported once by the server that verifier processes are forked from: math-verify, with sympy on pure Python integers.

With gmpy2, which sympy takes up by its mere presence, a factorial cannot be interrupted and results would depend on what
else is installed. The variable must be set before sympy is imported, hence a module of its own.
"""

import logging
import os

os.environ["SYMPY_GROUND_TYPES"] = "python"

import math_verify

logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)  # it warns in each process that its alarms are off

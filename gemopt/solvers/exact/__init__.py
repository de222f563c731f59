"""The true objective stated to CP-SAT and MILP."""

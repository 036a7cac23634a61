"""Many runs: what a study file asks for, its jobs, and the report on them.

May enter: choosing, scheduling and comparing runs. May not: what a single run or stage computes.
"""

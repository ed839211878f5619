"""Sweeps: one notebook executed for many parameter values on Dask, and the report of what came out.

`plan` (which runs), `store` (their folders), `cluster` (where they run), `execute` (running them), `table` (what
came out); `summary.ipynb` is the report's notebook.
"""

"""What can be measured: rows compared as bits (`verify`), the first operator that differs (`bisect`), native operators (`probe`).

A measurement finds counterexamples. That there are none it cannot prove; that is the audit's part.
"""

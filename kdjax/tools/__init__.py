"""What a user runs beside a training; each module stands alone.

- :mod:`kdjax.tools.preflight`: whether a step will fit, and how fast it can be.
- :mod:`kdjax.tools.report`: tables of results and web pages that need no network.
"""

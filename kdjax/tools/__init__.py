"""What a user runs beside a training; each module stands alone.

- :mod:`kdjax.tools.report`: tables of results and web pages that need no network.
"""

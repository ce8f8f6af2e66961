"""Checks of the kernels, which no run needs: against their references, under sanitizers, compiled for absent cards."""

import numba

# dcor, an oracle, as plain Python: compiling it takes every test process seconds, and aborted one.
numba.config.DISABLE_JIT = True

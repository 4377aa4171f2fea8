"""The scripts of a checkout: `python -m bench.report` and the like, from the repository's root.

What `reg-kernels bench` runs is library: it is in `reg_kernels/bench`, is installed and knows
nothing of this folder. What reads or writes the repository (its results, its pages, its builds) or
is measured for its reports alone is here.
"""

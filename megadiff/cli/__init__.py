"""The commands of `megadiff COMMAND`, one module each: to add one is to add its module.

A module's name is the command's, the first paragraph of its docstring is the line that `megadiff --help` shows, and
its `main()` reads the command line. A module imports what trains inside its functions, so that help and a wrong option
are answered at once. The scripts in `tools/` and `pretrain_dlm.py` run the same `main()` from a checkout; the code that
other parts of the package could use is further down, in the folder that it belongs to.
"""

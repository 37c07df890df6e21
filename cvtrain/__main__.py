"""Run the command line as `python -m cvtrain`."""

from cvtrain.cli import main

main()

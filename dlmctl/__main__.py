"""`python -m dlmctl` is `dlmctl`."""

from dlmctl.cli import main

main()

"""`python -m service` is `timetuner`."""

from service.cli import main

main()
